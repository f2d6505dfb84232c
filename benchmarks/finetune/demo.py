"""The demo itself: load, adapt, fuse, train side by side, report."""

from __future__ import annotations

import time
from dataclasses import dataclass

import torch
from rich.console import Console
from tqdm import tqdm

from benchmarks.machine import machine_info

from . import model, text
from .config import Config, Problem
from .report import write
from .summary import Result, printed
from .train import Run, evaluate, probe, race


@dataclass
class Data:
    """Rows of token ids `[rows, seq_len]`: the training part and the part of the held-out split that is evaluated."""

    train: torch.Tensor
    heldout: torch.Tensor


def run(config: Config) -> bool:
    """Run the whole demo and write its report.

    Returns:
        True; or False if Ctrl-C ended it early, with the report of what was measured until then.

    Raises:
        Problem: bad input.
        KeyboardInterrupt: Ctrl-C before the first step was done by every run.
    """
    console = Console()
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    source = model.find(config.model)
    _make_folder(config)
    began = time.monotonic()
    base, tokenizer = model.load(source, config)
    console.print(
        f"model    {source.name}, {config.dtype}, loaded in {time.monotonic() - began:.0f} s", highlight=False
    )
    data = _prepare(config, tokenizer)
    console.print(_about_data(config, data), highlight=False)

    eager = Run("PEFT eager", model.adapt(base, config))
    fused = Run("accelerated", model.twin(eager.model))
    fusion = model.fuse(fused.model)
    console.print(f"fused    {fusion}", highlight=False, markup=False)
    nudged = None
    if config.yardstick:
        nudged = Run("PEFT eager, nudged", model.twin(eager.model))
        model.nudge(nudged.model, torch.finfo(model.DTYPES[config.dtype]).eps / 2.0, config.seed)

    result = Result(config, source.name, machine_info(config.device), fusion, eager, fused, nudged)
    try:
        _measure(result, data)
    except KeyboardInterrupt:
        if not result.steps:
            raise
        result.end = f"interrupted after {result.steps} of {config.steps} steps"
    console.print()
    console.print(printed(result))
    if result.end:
        console.print(f"[bold]{result.end}[/bold]: the report holds what was measured until then")
    write(result)
    console.print(f"report   {config.out}/report.md, report.json, loss.png, bars.png", highlight=False, soft_wrap=True)
    return result.end is None or not result.end.startswith("interrupted")


def _make_folder(config: Config) -> None:
    """Make the report's folder before anything is computed, so that a bad path is known at once."""
    try:
        config.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise Problem(f"cannot make the folder {config.out}: {error.strerror}") from None


def _prepare(config: Config, tokenizer: object) -> Data:
    """Split the text, turn it into rows of tokens, choose the held-out rows to evaluate."""
    train_texts, heldout_texts = text.split(text.documents(config.data))
    train = text.blocks(train_texts, tokenizer, config.seq_len)
    heldout = text.blocks(heldout_texts, tokenizer, config.seq_len)
    if not len(train) or not len(heldout):
        raise Problem(
            f"too little text: {len(train)} training and {len(heldout)} held-out sequences of {config.seq_len} tokens; "
            "give more --data, or a smaller --seq-len"
        )
    return Data(train, text.spread(heldout, config.heldout_blocks))


def _about_data(config: Config, data: Data) -> str:
    """One line on the text."""
    name = ", ".join(path.name for path in config.data) or "the standard library's pydoc topics"
    return (
        f"text     {name}: {data.train.numel()} training tokens, "
        f"{data.heldout.numel()} held-out tokens evaluated, {config.tokens_per_step} tokens per step"
    )


def _measure(result: Result, data: Data) -> None:
    """Probe memory, evaluate, train, evaluate again; everything measured lands in `result` at once."""
    config, pair = result.config, (result.eager, result.fused)
    stream = text.batches(data.train, config.batch_size, config.seed)
    first = data.train[: config.batch_size]
    for run_ in tqdm(pair, desc="memory probe, held-out loss", unit="model", leave=False):
        probe(run_, first, config)
        run_.heldout.append(evaluate(run_, data.heldout, config))
    with tqdm(total=config.steps, desc="training", unit="step") as bar:
        for done in race(pair, result.nudged, stream, config):
            bar.update()
            bar.set_postfix(
                loss=f"{result.fused.losses[-1]:.3f}",
                eager_ms=f"{result.eager.step_ms[-1]:.0f}",
                fused_ms=f"{result.fused.step_ms[-1]:.0f}",
            )
        if done < config.steps:
            result.end = (
                f"stopped after {done} of {config.steps} steps: {config.minutes:g} minutes of training were over"
            )
    for run_ in tqdm(pair, desc="held-out loss", unit="model", leave=False):
        run_.heldout.append(evaluate(run_, data.heldout, config))
