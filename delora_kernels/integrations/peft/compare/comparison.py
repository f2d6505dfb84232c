"""What compare() found: a column for each form of the model, and how far the fused one's numbers
are from PEFT's.
"""

import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any

from delora_kernels.diagnostics.allocations import MIB
from delora_kernels.diagnostics.overhead import gone, interval
from delora_kernels.integrations.peft.fused.report import Report

TITLES = {"frozen": "without adapters", "peft": "PEFT", "fused": "delora-kernels"}
"""The forms of a model, and how the table names them."""


@dataclass(frozen=True)
class Column:
    """One form of the model.

    Args:
        form: "frozen", "peft" or "fused".
        milliseconds: Of forward and backward, one number a round.
        peak_mib: The most that a pass held at once beyond what was there before it, in MiB; None:
            it was not weighed.
        note: Why there are no numbers, such as "out of memory"; empty: there are.
    """

    form: str
    milliseconds: tuple[float, ...] = ()
    peak_mib: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Difference:
    """How far a fused result is from PEFT's: max |fused − PEFT| / max |PEFT|.

    Args:
        what: "loss", "output", or "gradient of" and the parameter's qualified name.
        error: The number.
    """

    what: str
    error: float


@dataclass(frozen=True)
class Comparison:
    """What compare() measured; `str()` of it is a block to paste.

    Args:
        columns: One for each form, in the order of the table.
        differences: Of the loss, of the output, and of the gradient that is farthest off; empty
            where one of the two forms did not run.
        report: What accelerate() says of the layers.
        facts: Lines on the model, the machine and the versions, title → text.
        tokens: Token ids in the batch; None: it has none.
        interrupted: Whether Ctrl-C ended it early.
    """

    columns: tuple[Column, ...]
    differences: tuple[Difference, ...]
    report: Report
    facts: Mapping[str, str]
    tokens: int | None = None
    interrupted: bool = False

    def column(self, form: str) -> Column:
        """Return the column of "frozen", "peft" or "fused"."""
        return next(column for column in self.columns if column.form == form)

    @cached_property
    def overhead_gone(self) -> tuple[float, float, float] | None:
        """The part of PEFT's overhead over the model without adapters that is gone, and the
        interval that holds 95 % of what the same rounds give when drawn anew; None without all
        three columns.

            1 − (fused − frozen) / (PEFT − frozen)
        """
        times = {column.form: column.milliseconds for column in self.columns if column.milliseconds}
        if len(times) < len(TITLES):
            return None
        return interval(lambda medians: gone(medians, "fused"), times)

    def ratio(self, form: str, over: str) -> tuple[float, float, float] | None:
        """Return how many times as long one form takes as another, and the interval of it."""
        times = {each: self.column(each).milliseconds for each in (form, over)}
        if not all(times.values()):
            return None
        return interval(lambda medians: medians[form] / medians[over], times)

    def to_dict(self) -> dict[str, Any]:
        """Return all of it as JSON has it."""
        columns = {column.form: asdict(column) | {"median_ms": _median(column)} for column in self.columns}
        for form, found in columns.items():
            found.pop("form")
            found |= {"milliseconds": list(found["milliseconds"]), "over_frozen": self.ratio(form, "frozen")}
        return {
            "columns": columns,
            "fused_over_peft": self.ratio("fused", "peft"),
            "overhead_gone": self.overhead_gone,
            "differences": {difference.what: difference.error for difference in self.differences},
            "fused_layers": len(self.report.fused),
            "adapter_layers": len(self.report.layers),
            "facts": dict(self.facts),
            "tokens": self.tokens,
            "interrupted": self.interrupted,
        }

    def __str__(self) -> str:
        lines = [f"{title:<8}  {text}" for title, text in self.facts.items()]
        lines += ["", _ROW.format("", "ms", "tokens/s", "peak MiB", "over frozen", "over PEFT")]
        lines += [self._row(column) for column in self.columns]
        if self.overhead_gone is not None:
            part, low, high = self.overhead_gone
            lines += ["", f"of PEFT's overhead gone: {part:.0%} ({low:.0%} to {high:.0%})"]
        if self.differences:
            lines += ["", "fused against PEFT, largest difference over largest value:"]
            lines += [f"  {each.error:.1e}  {each.what}" for each in self.differences]
        lines += ["", str(self.report)]
        if self.interrupted:
            lines.append("interrupted: fewer rounds than asked for")
        return "\n".join(lines)

    def _row(self, column: Column) -> str:
        title = TITLES[column.form]
        median = _median(column)
        if median is None:
            return f"{title:<17} {column.note}"
        speed = "-" if self.tokens is None else f"{1e3 * self.tokens / median:.0f}"
        peak = "-" if column.peak_mib is None else f"{column.peak_mib:.0f}"
        frozen = "-" if column.form == "frozen" else _with_interval(self.ratio(column.form, "frozen"))
        peft = _with_interval(self.ratio("fused", "peft")) if column.form == "fused" else "-"
        row = _ROW.format(title, f"{median:.1f}", speed, peak, frozen, peft)
        return f"{row}  {column.note}" if column.note else row


_ROW = "{:<17} {:>9} {:>9} {:>9} {:>19} {:>19}"


def _median(column: Column) -> float | None:
    return statistics.median(column.milliseconds) if column.milliseconds else None


def _with_interval(ratio: tuple[float, float, float] | None) -> str:
    return "-" if ratio is None else "{:.2f} ({:.2f} to {:.2f})".format(*ratio)


def mib(size: float) -> float:
    """Return bytes as MiB."""
    return size / MIB
