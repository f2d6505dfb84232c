"""What was measured, condensed: the numbers and the rows of the table."""

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import mean, median

import numpy as np
from rich.table import Table

from benchmarks.finetune.config import Config
from benchmarks.finetune.train import Run

TAIL = 5


@dataclass
class Result:
    """Everything one demo run knows.

    Attributes:
        config: the settings.
        model: the model's name.
        machine: what it ran on.
        fusion: what `accelerate()` reported.
        eager: PEFT as it comes.
        fused: the same model, accelerated.
        nudged: PEFT again from a start changed by one rounding error; None if not wanted.
        end: why the run ended early; None if it did not.
        interrupted: whether that was Ctrl-C.
    """

    config: Config
    model: str
    machine: dict[str, str | int | None]
    fusion: str
    eager: Run
    fused: Run
    nudged: Run | None = None
    end: str | None = None
    interrupted: bool = False

    @property
    def steps(self) -> int:
        """Steps that both runs have finished."""
        return min(len(self.eager.step_ms), len(self.fused.step_ms))

    def losses(self, run: Run) -> list[float]:
        """Losses of the steps that both runs have finished."""
        return run.losses[: self.steps]

    def step_ms(self, run: Run) -> list[float]:
        """Durations in ms of the steps that both runs have finished."""
        return run.step_ms[: self.steps]

    def differences(self, run: Run) -> list[float]:
        """|loss of `run` − loss of the eager run| at each step that both have finished."""
        return [abs(a - b) for a, b in zip(run.losses, self.losses(self.eager), strict=False)]

    def speedup(self) -> float:
        """Median over the steps of eager ms / accelerated ms: drift of the machine cancels within a step."""
        return median(a / b for a, b in zip(self.step_ms(self.eager), self.step_ms(self.fused), strict=True))


@dataclass(frozen=True)
class Row:
    """One line of the table; `ratio` compares the two where that says something."""

    label: str
    eager: str
    fused: str
    ratio: str = ""


def spread_ms(values: Sequence[float]) -> tuple[float, float, float]:
    """The 20th, 50th and 80th percentile."""
    low, middle, high = np.percentile(values, (20, 50, 80))
    return float(low), float(middle), float(high)


def rows(result: Result) -> list[Row]:
    """The table: time, memory, losses."""
    eager, fused = result.eager, result.fused
    (a20, a50, a80), (b20, b50, b80) = (spread_ms(result.step_ms(run)) for run in (eager, fused))
    tokens = result.config.tokens_per_step
    table = [
        Row("step, median (ms)", f"{a50:.1f}", f"{b50:.1f}", f"{result.speedup():.2f}x faster"),
        Row("step, p20 to p80 (ms)", f"{a20:.1f} to {a80:.1f}", f"{b20:.1f} to {b80:.1f}"),
        Row("tokens/s", f"{1e3 * tokens / a50:.0f}", f"{1e3 * tokens / b50:.0f}"),
    ]
    if eager.peak_mib and fused.peak_mib:
        peaks = [median(run.peak_mib) for run in (eager, fused)]
        table.append(_memory("peak of a step above resident (MiB)", *peaks))
    if eager.kept_mib is not None and fused.kept_mib is not None:
        table.append(_memory("kept for backward (MiB)", eager.kept_mib, fused.kept_mib))
    table += [
        Row("train loss, first step", f"{eager.losses[0]:.4f}", f"{fused.losses[0]:.4f}"),
        Row(
            f"train loss, mean of last {min(TAIL, result.steps)}",
            *(f"{_tail(result, run):.4f}" for run in (eager, fused)),
        ),
    ]
    for index, when in enumerate(("before", "after")):
        if len(fused.heldout) > index:
            table.append(Row(f"held-out loss {when}", f"{eager.heldout[index]:.4f}", f"{fused.heldout[index]:.4f}"))
    table.append(Row(f"largest loss difference, {result.steps} steps", "", f"{max(result.differences(fused)):.2g}"))
    if result.nudged is not None and result.nudged.losses:
        drift = result.differences(result.nudged)
        same = result.differences(fused)[: len(drift)]
        table.append(
            Row(f"  first {len(drift)} steps; eager column: eager, nudged", f"{max(drift):.2g}", f"{max(same):.2g}")
        )
    return table


def _memory(label: str, eager: float, fused: float) -> Row:
    """One line about memory, with how much less it is."""
    return Row(label, f"{eager:.0f}", f"{fused:.0f}", f"{100.0 * (1.0 - fused / eager):.0f} % less" if eager else "")


def _tail(result: Result, run: Run) -> float:
    """Mean of the last losses."""
    return mean(result.losses(run)[-TAIL:])


def printed(result: Result) -> Table:
    """The table for the terminal."""
    config = result.config
    table = Table(
        title=f"{config.method} r={config.rank} on {result.model}: {result.steps} steps each, "
        f"alternating, {config.batch_size} x {config.seq_len} tokens, {precision(config)}",
        title_justify="left",
    )
    table.add_column("")
    for name in ("PEFT eager", "accelerated", ""):
        table.add_column(name, justify="right")
    for row in rows(result):
        table.add_row(row.label, row.eager, row.fused, row.ratio)
    return table


def precision(config: Config) -> str:
    """The arithmetic in a few words."""
    return f"{config.dtype} base, fp32 adapters, {'bf16 autocast' if config.autocast else 'no autocast'}"
