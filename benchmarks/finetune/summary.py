"""What was measured, condensed: the numbers and the rows of the table."""

from collections.abc import Sequence
from dataclasses import astuple, dataclass
from statistics import mean, median

import numpy as np
from rich.table import Table

from benchmarks.finetune.config import Config
from benchmarks.finetune.floor import Floor
from benchmarks.finetune.train import Run
from benchmarks.finetune.verdict import WINDOW, Verdict, judge
from benchmarks.overhead import interval, speed_in_words

TAIL = 5
ENOUGH_STEPS = 5  # fewer say nothing about speed


@dataclass
class Result:
    """Everything one demo run knows.

    Attributes:
        config: the settings.
        model: the model's name.
        machine: what it ran on.
        fusion: what `accelerate()` reported.
        eager: PEFT as it comes, or GOAT as its authors run it.
        fused: the same model, accelerated.
        floor: the first table.
        yardsticks: PEFT again, with its sums in other orders, or once with its start changed by one
            rounding error.
        end: why the run ended early; None if it did not.
        interrupted: whether that was Ctrl-C.
    """

    config: Config
    model: str
    machine: dict[str, str | int | None]
    fusion: str
    eager: Run
    fused: Run
    yardsticks: Sequence[Run] = ()
    floor: Floor | None = None
    end: str | None = None
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """Steps that both runs have finished."""
        return min(len(self.eager.step_ms), len(self.fused.step_ms))

    @property
    def nudged_or_reordered(self) -> list[Run]:
        """The yardsticks that have finished a step."""
        return [run for run in self.yardsticks if run.losses]

    def losses(self, run: Run) -> list[float]:
        """Losses of the steps that both runs have finished."""
        return run.losses[: self.steps]

    def step_ms(self, run: Run) -> list[float]:
        """Durations in ms of the steps that both runs have finished."""
        return run.step_ms[: self.steps]

    def tokens_per_s(self, run: Run) -> float:
        """Return the median over the steps of tokens over time."""
        return 1e3 * median(tokens / ms for tokens, ms in zip(run.tokens, self.step_ms(run), strict=False))

    def shortened(self) -> str | None:
        """Say where sequences were shortened to keep to the time; None: nowhere."""
        whole = self.config.tokens_per_step
        for done, tokens in enumerate(self.eager.tokens[: self.steps], start=1):
            if tokens < whole:
                return f"the machine became slower: fewer than {whole} tokens a step from step {done} on"
        return None

    def differences(self, run: Run) -> list[float]:
        """|loss of `run` − loss of the eager run| at each step that both have finished."""
        return [abs(a - b) for a, b in zip(run.losses, self.losses(self.eager), strict=False)]

    def verdict(self) -> Verdict | None:
        """Whether the accelerated run is within the spread of the eager runs; None without
        reordered ones.
        """
        if not self.nudged_or_reordered or not self.config.reordered:
            return None
        return judge(self.fused.losses, [self.eager.losses, *(run.losses for run in self.nudged_or_reordered)])

    def speedup(self) -> float:
        """Median over the steps of eager ms / accelerated ms: drift of the machine cancels within a
        step.
        """
        return self.speedup_interval()[0]

    def speedup_interval(self) -> tuple[float, float, float]:
        """Return the speed-up, and the interval that holds 95 % of it over steps drawn anew."""
        ratios = [a / b for a, b in zip(self.step_ms(self.eager), self.step_ms(self.fused), strict=True)]
        return interval(lambda medians: medians["ratio"], {"ratio": ratios})

    @property
    def trusted(self) -> bool:
        """Whether times say something: there are enough steps, and which run is faster is beyond
        doubt.
        """
        _, low, high = self.speedup_interval()
        return self.config.times and self.steps >= ENOUGH_STEPS and not low <= 1.0 <= high


@dataclass(frozen=True)
class Row:
    """One line of the table: the two runs' cells, and a remark where comparing them says
    something.
    """

    label: str
    cells: tuple[str, ...]
    remark: str = ""


def spread_ms(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the 20th, 50th and 80th percentile."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    return float(low), float(middle), float(high)


def rows(result: Result) -> list[Row]:
    """Return the table: time, memory, losses."""
    return [*(_times(result) if result.config.times else []), *_sizes(result), *_losses(result)]


def _times(result: Result) -> list[Row]:
    """Return the lines about time."""
    times = [spread_ms(result.step_ms(run)) for run in (result.eager, result.fused)]
    return [
        Row("step, median (ms)", tuple(number(p50) for _, p50, _ in times), speed(result)),
        Row("step, p20 to p80 (ms)", tuple(f"{number(p20)} to {number(p80)}" for p20, _, p80 in times)),
        Row("tokens/s", tuple(f"{result.tokens_per_s(run):.0f}" for run in (result.eager, result.fused))),
    ]


def _sizes(result: Result) -> list[Row]:
    """Return the lines about memory."""
    eager, fused = result.eager, result.fused
    table = []
    if eager.peak_mib and fused.peak_mib:
        table.append(_memory("peak above resident (MiB)", median(eager.peak_mib), median(fused.peak_mib)))
    if eager.kept_mib is not None and fused.kept_mib is not None:
        table.append(_memory("kept for backward (MiB)", eager.kept_mib, fused.kept_mib))
    return table


def _losses(result: Result) -> list[Row]:
    """Return the lines about the losses."""
    eager, fused = pair = result.eager, result.fused
    tail = min(TAIL, result.steps)
    table = [
        Row("train loss, first step", tuple(f"{run.losses[0]:.4f}" for run in pair)),
        Row(f"train loss, mean of last {tail}", tuple(f"{mean(result.losses(run)[-tail:]):.4f}" for run in pair)),
    ]
    for index, when in enumerate(("before", "after")):
        if len(eager.heldout) > index and len(fused.heldout) > index:
            table.append(Row(f"held-out loss {when}", tuple(f"{run.heldout[index]:.4f}" for run in pair)))
    apart = result.differences(fused)
    table.append(Row("largest loss difference", ("", f"{largest(apart):.2g}"), f"over {len(apart)} steps"))
    verdict = result.verdict()
    if verdict is not None:
        names = ("mean distance to eager runs", f"  worst {WINDOW} steps", "  worst step")
        pairs = zip(astuple(verdict.fused), astuple(verdict.spread), strict=True)
        for name, (one, other) in zip(names, pairs, strict=True):
            table.append(Row(name, ("", f"{one:.2g}"), f"eager runs: {other:.2g}"))
    elif result.nudged_or_reordered:
        drift = result.differences(result.nudged_or_reordered[0])
        cells = ("", f"{largest(apart[: len(drift)]):.2g}")
        table.append(Row(f"  in the first {len(drift)} steps", cells, f"nudged: {largest(drift):.2g}"))
    return table


def largest(values: Sequence[float]) -> float:
    """Return the largest value; NaN if one is NaN, which `max` may hide."""
    return float(np.max(values))


def number(value: float) -> str:
    """Return a duration or a size with three digits or more."""
    return f"{value:.0f}" if value >= 100.0 else f"{value:.3g}"


def speed(result: Result) -> str:
    """Return the speed-up in words, or why there is none to be told."""
    if result.steps < ENOUGH_STEPS:
        return "too few steps"
    return speed_in_words(*result.speedup_interval())


def _memory(label: str, eager: float, fused: float) -> Row:
    """One line about memory, with how much less it is."""
    less = 100.0 * (1.0 - fused / eager) if eager else 0.0
    return Row(label, (number(eager), number(fused)), f"{abs(less):.0f} % {'less' if less >= 0.0 else 'more'}")


def printed(result: Result) -> Table:
    """Return the table for the terminal."""
    config = result.config
    table = Table(
        title=f"{config.method} r={config.rank} on {result.model}: {result.steps} steps each, "
        f"alternating, {tokens(config)}, {precision(config)}",
        title_justify="left",
        caption=_caption(result),
        caption_justify="left",
    )
    table.add_column("", no_wrap=True)
    for name in (config.eager_name, "accelerated", ""):
        table.add_column(name, justify="right", no_wrap=bool(name))
    for row in rows(result):
        table.add_row(row.label, *row.cells, row.remark)
    return table


def precision(config: Config) -> str:
    """Return the arithmetic in a few words."""
    stored = "" if config.quantise is None else f"{config.quantise} storage, "
    words = [f"{stored}{config.dtype} base, fp32 adapters"]
    words.append(f"{config.autocast_dtype} autocast" if config.autocast else "no autocast")
    return ", ".join(words + ["GradScaler"] * config.scaler + ["checkpointing"] * config.checkpointing)


def tokens(config: Config) -> str:
    """Return what one step sees."""
    parts = f"{config.accumulation} x " if config.accumulation > 1 else ""
    return f"{parts}{config.batch_size} x {config.seq_len} tokens"


def _caption(result: Result) -> str | None:
    """Return what the table calls the yardsticks."""
    if not result.nudged_or_reordered:
        return None
    if result.config.reordered:
        return (
            f"eager runs: the two furthest apart of {1 + len(result.nudged_or_reordered)} that differ in the order of "
            "summation alone"
        )
    return "nudged: eager once more, its adapters changed at the start by at most one rounding error"
