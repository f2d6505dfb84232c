"""The first table: what adapters cost over the frozen model, and what part of that is gone.

A round is a step of the frozen model, the floor, and one each of PEFT's model and of ours with
LoRA, DoRA and DeLoRA, in turn, as benchmarks/overhead.py takes them. On a machine too slow for
that, the model's first blocks with a small vocabulary stand for it, then fewer tokens a step: an
interval needs rounds.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from statistics import fmean, median
from typing import Any

import torch
from rich.table import Table
from torch import nn
from tqdm import tqdm

from benchmarks.finetune import sizing
from benchmarks.finetune.config import Config
from benchmarks.finetune.model import adapt, twin
from benchmarks.finetune.train import autocast
from benchmarks.overhead import Step, compared, interval, speed_in_words
from benchmarks.timing import Budget, Clock, Pass, clock_of, rounds

METHODS = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA"}
IMPLEMENTATIONS = {"peft": "PEFT", "dk": "accelerated"}
VOCABULARY = 1024
"""Of a part of the model: the head on all tokens would outweigh a few blocks."""


@dataclass(frozen=True)
class Floor:
    """What the rounds found.

    Attributes:
        times: "frozen", "lora peft", "lora dk", ... → milliseconds of every round.
        blocks: blocks of the model that took the steps.
        all_blocks: blocks that it has.
        batch_size, seq_len: what a step saw.
        threads: of the CPU.
        cost: of a step of the whole frozen model.
    """

    times: Mapping[str, list[float]]
    blocks: int
    all_blocks: int
    batch_size: int
    seq_len: int
    threads: int
    cost: sizing.Cost

    def cost_of(self, method: str) -> sizing.Cost | None:
        """Return what a step with a method costs, the mean of PEFT's and ours; None: not timed."""
        if method not in METHODS:
            return None
        pair = [median(self.times[f"{method} {impl}"]) for impl in IMPLEMENTATIONS]
        return self.cost.times(fmean(pair) / median(self.times["frozen"]))

    @property
    def rounds(self) -> int:
        """How often each took a step."""
        return len(self.times["frozen"])

    @cached_property
    def rows(self) -> list[dict[str, Any]]:
        """Return a row for the frozen model, and one for each method and implementation."""
        found = [{"method": None, "impl": "frozen", **compared(self.times, "frozen")}]
        for method in METHODS:
            peft, ours = (f"{method} {impl}" for impl in IMPLEMENTATIONS)
            found.append({"method": method, "impl": "peft", **compared(self.times, peft)})
            pair = {name: self.times[name] for name in (peft, ours)}
            speedup = interval(lambda medians, peft=peft, ours=ours: medians[peft] / medians[ours], pair)  # type: ignore[misc]
            own = {"speedup": speedup[0], "speedup_interval": speedup[1:]}
            found.append({"method": method, "impl": "dk", **compared(self.times, ours, peft), **own})
        return found

    def as_json(self) -> dict[str, Any]:
        """Return all of it as plain JSON values."""
        sizes = {"blocks": self.blocks, "all_blocks": self.all_blocks, "batch_size": self.batch_size}
        sizes |= {"seq_len": self.seq_len, "threads": self.threads, "rounds": self.rounds}
        return {**sizes, "rows": self.rows, "step_ms": dict(self.times)}

    def cells(self) -> list[tuple[str, str, str, str, str]]:
        """Return the table: who, ms of a step, over the floor, speed, part of PEFT's overhead
        gone.
        """
        lines, certain = [], False
        for row in self.rows:
            who = "frozen model: floor"
            if row["method"]:
                who = f"{METHODS[row['method']]}, {IMPLEMENTATIONS[row['impl']]}"
            ratio = speed = part = ""
            low, high = row["ratio_interval"]
            if row["method"]:
                ratio = f"{row['ratio_to_frozen']:.2f}x ({low:.2f} to {high:.2f})"
            if row["impl"] == "peft":
                certain = low > 1.0  # else there is no overhead to take a part of
            if row["impl"] == "dk":
                speed, part = self._verdict(row, certain)
            lines.append((who, f"{row['median_ms']:.4g}", ratio, speed, part))
        return lines

    def _verdict(self, row: Mapping[str, Any], certain: bool) -> tuple[str, str]:
        """Return speed, and part gone, in words."""
        if self.rounds < sizing.ENOUGH_ROUNDS:
            return "too few rounds", "too few rounds"
        low, high = row["speedup_interval"]
        speed = speed_in_words(row["speedup"], low, high)
        if low <= 1.0 <= high or not certain:
            return speed, "too noisy"
        return speed, "{:.0%} ({:.0%} to {:.0%})".format(row["overhead_gone"], *row["gone_interval"])

    def words(self) -> str:
        """Say what a step was."""
        part = "" if self.blocks == self.all_blocks else f", the first {self.blocks} of {self.all_blocks} blocks"
        part += f" and {VOCABULARY} tokens of the vocabulary" * bool(part)
        return f"medians of {self.rounds} rounds, {self.batch_size} x {self.seq_len} tokens a step{part}"


COLUMNS = ("", "step (ms)", "over the floor", "speed", "PEFT's overhead gone")


def printed(floor: Floor) -> Table:
    """Return the table for the terminal."""
    table = Table(title=f"What adapters cost: {floor.words()}", title_justify="left")
    for name in COLUMNS:
        table.add_column(name, justify="right" if name else "left", no_wrap=not name)
    for line in floor.cells():
        table.add_row(*line)
    return table


def measure(model: nn.Module, config: Config, end: float, say: Callable[[str], None]) -> Floor:
    """Time the machine, choose a size, take the rounds.

    Args:
        model: without adapters; stays as it is, but for being frozen.
        config: rank, device, threads, the most tokens of a step, the most rounds.
        end: the value of `time.monotonic()` by which the whole report is to be there.
        say: hears in one line what was chosen.
    """
    model.requires_grad_(False)
    frozen = _step(model, "none", "frozen", config)
    timed = _timer(frozen, config)
    cost = sizing.measure(timed, config)
    threads = torch.get_num_threads()
    report, end = end, time.monotonic() + sizing.table_seconds(config, cost, end - time.monotonic())
    all_blocks = len(_blocks(model))
    blocks = sizing.blocks_of(cost, all_blocks, end - time.monotonic())
    if blocks < all_blocks:
        model = part_of(model, blocks)
        frozen = _step(model, "none", "frozen", config)
    taken = f"machine  a step of {sizing.LONG} tokens of the frozen model takes {cost.step(sizing.LONG):.2g} s here"
    say(f"{taken}, with {threads} of {config.most_threads} threads: timing {blocks} of {all_blocks} blocks")
    steps = {"frozen": frozen}
    for method in METHODS:
        adapted = adapt(twin(model), replace(config, method=method, checkpointing=False))
        steps |= {f"{method} {impl}": _step(adapted, method, impl, config) for impl in IMPLEMENTATIONS}
    short = sum(_timer(step, config)(sizing.SHORT) for step in steps.values())  # warms up too
    batch_size, seq_len, one = sizing.table(config, cost, short, end - time.monotonic())
    for step in steps.values():
        step.tokens = sizing.rows_of_ids(batch_size, seq_len, config)
    left = end - time.monotonic()
    least = min(sizing.least_rounds(one, left, report - time.monotonic()), config.rounds)
    budget = Budget(left - one, least, config.rounds, warmup=int(left > (sizing.ROUNDS + 1) * one))
    with tqdm(total=config.rounds, desc="frozen, PEFT, accelerated", unit="round", leave=False) as bar:
        spent = rounds(steps, _Counted(clock_of(config.device), bar.update), budget)
    times = {name: [ms for ms, _ in found] for name, found in spent.items()}
    return Floor(times, blocks, all_blocks, batch_size, seq_len, threads, cost)


def _step(model: nn.Module, method: str, name: str, config: Config) -> Step:
    tokens = sizing.rows_of_ids(1, sizing.SHORT, config)
    return Step(model, method, name, tokens, lambda: autocast(config), strict=False)


def _timer(step: Step, config: Config) -> Callable[[int], float]:
    """Return what takes a step of one sequence of so many tokens, and returns its seconds."""

    def timed(length: int) -> float:
        step.tokens = sizing.rows_of_ids(1, length, config)
        began = time.monotonic()
        step().item()
        return time.monotonic() - began

    return timed


@dataclass(frozen=True)
class _Counted:
    """A clock that tells when a round is over."""

    clock: Clock
    done: Callable[[], Any]

    def round(self, passes: Mapping[str, Pass]) -> dict[str, tuple[float, float | None] | Exception]:
        spent = self.clock.round(passes)
        self.done()
        return spent


def _blocks(model: nn.Module) -> nn.ModuleList:
    """Return the list of the model's blocks: its longest list."""
    return max((m for m in model.modules() if isinstance(m, nn.ModuleList)), key=len, default=nn.ModuleList())


def part_of(model: nn.Module, blocks: int) -> nn.Module:
    """Return the frozen model's first blocks and the first VOCABULARY of its tokens: the weights
    are the same tensors, or views of them.
    """
    part: Any = twin(model)
    del _blocks(part)[blocks:]
    part.config.num_hidden_layers = blocks
    part.config.vocab_size = min(VOCABULARY, part.config.vocab_size)
    for module in (part.get_input_embeddings(), part.get_output_embeddings()):
        module.padding_idx = None  # it may be one of the tokens that are gone
        for name, parameter in dict(module.named_parameters(recurse=False)).items():
            setattr(module, name, nn.Parameter(parameter[:VOCABULARY], requires_grad=False))
    return part
