"""The demo itself: load, adapt, fuse, train side by side, report."""

import contextlib
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks.finetune import floor, model, sizing, text
from benchmarks.finetune.config import Config, Problem
from benchmarks.finetune.orders import orders, sum_in_parts
from benchmarks.finetune.report import FILES, write
from benchmarks.finetune.summary import Result, printed, tokens
from benchmarks.finetune.train import Run, evaluate, probe, race
from benchmarks.machine import machine_info


@dataclass
class Data:
    """Rows of token ids `[rows, seq_len]`: the training part, and what is evaluated of the held-out
    part.
    """

    train: torch.Tensor
    heldout: torch.Tensor


def run(config: Config, began: float | None = None) -> Result:
    """Run the whole demo and write its report.

    Args:
        config: The settings.
        began: The value of `time.monotonic()` when the command began, from which its minutes count;
            None: now.

    Returns:
        What was measured; with `interrupted` set if Ctrl-C cut the run short.

    Raises:
        Problem: bad input.
        KeyboardInterrupt: Ctrl-C before every run had done its first step.
    """
    now = time.monotonic()
    began = now if began is None else began
    end = math.inf if config.minutes is None else sizing.end_of(config.minutes, began, now)
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = model.find(config.model)
    documents = text.documents(config.data)
    with _folder(config):
        result, data = _prepare(config, source, documents, end)
        try:
            _measure(result, data, end)
        except KeyboardInterrupt:
            if not result.steps:
                raise
            result.interrupted = True
            result.end = f"interrupted after {result.steps} of {result.config.steps} steps"
        _say("")
        Console().print(printed(result))
        verdict = result.verdict()
        if verdict is not None:
            _say(verdict.words())
        if result.shortened():
            _say(f"{result.shortened()}")
        if result.end:
            _say(f"{result.end}: the report holds what was measured until then")
        write(result)
        _say(f"report   {', '.join(FILES)} in {config.out}")
    return result


def _say(line: str) -> None:
    """Print one line as it is."""
    Console().print(line, highlight=False, markup=False, soft_wrap=True)


@contextlib.contextmanager
def _folder(config: Config) -> Any:
    """Make the report's folder before anything is computed; take it away again if it stays
    empty.
    """
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the folder {config.out}: {error.strerror}") from None
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            config.out.rmdir()


def _prepare(config: Config, source: model.Source, documents: list[str], end: float) -> tuple[Result, Data]:
    """Load, make the first table, adapt, fuse, fit the run to the machine, tokenise."""
    loading = time.monotonic()
    stored = "" if config.quantise is None else f"{config.quantise}, "
    _say(f"model    {source.name}, {stored}{config.dtype}, loading")
    base, tokenizer = model.load(source, config)
    _say(f"         loaded in {time.monotonic() - loading:.0f} s")
    table = _table(base, config, end) if config.rounds else None
    adapted = model.adapt(base, config)
    fused = Run("accelerated", model.twin(adapted), scaler=_scaler(config))
    eager = Run(config.eager_name, model.as_rival(adapted, config), scaler=_scaler(config))
    fusion = model.fuse(fused.model)
    _say(f"adapters {fusion}")
    yardsticks = list(_yardsticks(config, eager.model)) if config.yardstick else []
    if config.sized:
        config = _sized(config, eager, table, end)
    data = _tokens(config, tokenizer, documents)
    machine = machine_info(config.device)
    return Result(config, source.name, machine, fusion, eager, fused, yardsticks, table), data


def _table(base: torch.nn.Module, config: Config, end: float) -> floor.Floor:
    """Measure what adapters cost over the frozen model, in a part of the time that is left, and
    print it.
    """
    found = floor.measure(base, config, end, _say)
    Console().print(floor.printed(found))
    return found


def _sized(config: Config, eager: Run, table: floor.Floor | None, end: float) -> Config:
    """Fit the run to what is left until `end`, by the table's steps or by short ones."""
    cost = None if table is None else table.cost_of(config.method)
    if cost is None:
        cost = sizing.measure(sizing.timer(eager, config), config)
    fitted = sizing.fitted(config, cost, end - time.monotonic())
    _say(
        f"size     a step of {tokens(config)} takes about {cost.step(config.tokens_per_step):.2g} s here: "
        f"{fitted.steps} steps of {tokens(fitted)}, {fitted.heldout_blocks} held-out sequences, "
        f"{torch.get_num_threads()} of {config.most_threads} threads"
    )
    return fitted


def _yardsticks(config: Config, eager: torch.nn.Module) -> Iterator[Run]:
    """Eager runs that show how far rounding alone drives losses apart."""
    if config.reordered:
        found = islice(orders(config.accumulation, config.batch_size), config.orders)
        for number, order in enumerate(found, start=2):
            other = Run("eager, summed in other orders", model.twin(eager), scaler=_scaler(config), order=order)
            sum_in_parts(other.model, 1 / number)
            yield other
    else:
        nudged = Run("eager, nudged at the start", model.twin(eager), scaler=_scaler(config))
        model.nudge(nudged.model, torch.finfo(model.DTYPES[config.dtype]).eps / 2.0, config.seed)
        yield nudged


def _scaler(config: Config) -> torch.amp.GradScaler:
    """Return a new scaler, disabled unless the config wants one."""
    return torch.amp.GradScaler(torch.device(config.device).type, enabled=config.scaler)


def _tokens(config: Config, tokenizer: Any, documents: list[str]) -> Data:
    """Split the documents, turn both parts into rows of tokens, choose the held-out rows to
    evaluate.
    """
    train, heldout = (text.blocks(part, tokenizer, config.seq_len) for part in text.split(documents))
    if not len(train) or not len(heldout):
        raise Problem(
            f"too little text: {len(train)} training and {len(heldout)} held-out sequences of {config.seq_len} tokens; "
            "give more --data, or a smaller --seq-len"
        )
    heldout = text.spread(heldout, config.heldout_blocks)
    name = ", ".join(path.name for path in config.data) or "the standard library's pydoc topics"
    _say(
        f"text     {name}: {train.numel()} training tokens, {heldout.numel()} held-out tokens evaluated, "
        f"{config.tokens_per_step} tokens per step"
    )
    return Data(train, heldout)


def _measure(result: Result, data: Data, end: float) -> None:
    """Probe memory, evaluate, train, evaluate again; everything measured lands in `result` at
    once.
    """
    config, pair = result.config, (result.eager, result.fused)
    stream = text.batches(data.train, config.sequences_per_step, config.seed)
    first = data.train[: config.batch_size]
    started = time.monotonic()
    for each in pair:
        probe(each, first, config)
    probed = time.monotonic()
    rows = data.heldout
    if config.sized:
        batches = sizing.heldout_within((probed - started) / len(pair), end - probed, len(rows))
        rows = text.spread(rows, batches * config.batch_size)
    _evaluate(result, rows, "held-out loss before")
    deadline = end - (time.monotonic() - probed)  # the evaluation at the end takes as long as this one
    least = sizing.LEAST_STEPS if config.sized else 1  # what was sized is nearly in time, and one step is no curve
    with tqdm(total=config.steps, desc="training", unit="step") as bar:
        for _ in race(pair, result.yardsticks, stream, config, deadline, least):
            bar.update()
            bar.set_postfix(
                loss=f"{result.fused.losses[-1]:.3f}",
                eager_ms=f"{result.eager.step_ms[-1]:.0f}",
                fused_ms=f"{result.fused.step_ms[-1]:.0f}",
            )
    if result.steps < config.steps:
        result.end = (
            f"stopped after {result.steps} of {config.steps} steps: the run was to last {config.minutes:g} minutes"
        )
    _evaluate(result, rows, "held-out loss after")


def _evaluate(result: Result, rows: torch.Tensor, name: str) -> None:
    """Evaluate both models on the same rows."""
    pair = result.eager, result.fused
    with tqdm(total=len(pair) * len(rows), desc=name, unit="sequence", leave=False) as bar:
        for each in pair:
            each.heldout.append(evaluate(each, rows, result.config, bar.update))
