"""WeightChanges: what weight_changes finds, as rows, numbers, a table and a plot."""

import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from delora_kernels import checks

OVER = ("all", "layers", "steps")


@dataclass(frozen=True)
class LayerChange:
    """How one weight has changed.

    Args:
        name: Of its layer, or of its parameter, in the model without adapters.
        method: What changed it: "lora", "rslora", "dora", "delora", "ether", "ether+", several of
            them, or "full": it was trained itself.
        adapters: Names of the adapters in PEFT.
        expert: Number of the expert; None: the weight is not one of several experts'.
        step: The step, if it was given.
        magnitude: ΔM, the mean over vectors of |‖w'‖ − ‖w‖|.
        direction: ΔD, the mean over vectors of 1 − cos(w', w); NaN where all vectors are 0.
        update_norm: ‖W' − W‖_F.
        weight_norm: ‖W‖_F.
        mean_length: The mean of ‖w‖, to which ΔM compares.
        vectors: How many vectors there are.
        zero_vectors: How many of them are 0, before or after: they have no direction, and ΔD is
            the mean over the others.
        bound: What update_norm can't exceed, of DeLoRA: λ max n, of several adapters the sum;
            None: nothing bounds it.
    """

    name: str
    method: str
    adapters: tuple[str, ...]
    expert: int | None
    step: int | None
    magnitude: float
    direction: float
    update_norm: float
    weight_norm: float
    mean_length: float
    vectors: int
    zero_vectors: int
    bound: float | None = None

    @property
    def update(self) -> float:
        """‖W' − W‖_F / ‖W‖_F; infinite of a weight that was 0, and NaN where it still is."""
        if self.weight_norm == 0:
            return math.inf if self.update_norm else math.nan
        return self.update_norm / self.weight_norm

    @property
    def label(self) -> str:
        """The name, and the expert's number behind a colon."""
        return self.name if self.expert is None else f"{self.name}:{self.expert}"


@dataclass(frozen=True)
class LeftOut:
    """A layer that was not measured, and why."""

    name: str
    reason: str


@dataclass(frozen=True)
class WeightChanges:
    """How weights have changed, at one step or at several; `str()` of it is the text for people.

    `a + b` has the rows of both.

    Args:
        rows: One for each weight and step.
        left: What was not measured.
        axis: "output" or "input", as `weight_changes` takes it.
    """

    rows: tuple[LayerChange, ...]
    left: tuple[LeftOut, ...] = ()
    axis: str = "output"

    def __add__(self, other: "WeightChanges") -> "WeightChanges":
        """Return the rows of both; what is left is said once.

        Raises:
            ValueError: they measure other vectors.
        """
        if not isinstance(other, WeightChanges):
            return NotImplemented
        if other.axis != self.axis:
            remedy = "measure both along one axis"
            raise checks.fail(
                ValueError, "WeightChanges.__add__", "other", f"of axis {self.axis!r}", other.axis, remedy
            )
        return WeightChanges((*self.rows, *other.rows), tuple(dict.fromkeys((*self.left, *other.left))), self.axis)

    @property
    def steps(self) -> tuple[int | None, ...]:
        """The steps of the rows, in their order."""
        return tuple(dict.fromkeys(row.step for row in self.rows))

    def of(self, *parts: str) -> "WeightChanges":
        """Return the rows whose name has one of `parts` in it: `changes.of("q_proj")`."""
        kept = tuple(row for row in self.rows if any(part in row.name for part in parts))
        return WeightChanges(kept, self.left, self.axis)

    def correlation(self, over: str = "all") -> float:
        """Return Pearson's correlation of ΔD and ΔM.

        A weight that has not changed at all is no point.

        Args:
            over: "all", over all rows, as the paper does over layers and steps; "layers", over the
                layers of a step, the mean over steps; "steps", over the steps of a layer, the mean
                over layers.

        Returns:
            It, in [-1, 1]; NaN with fewer than three points, or points of one ΔM or ΔD.

        Raises:
            ValueError: `over` is another word.
        """
        checks.option("WeightChanges.correlation", "over", over, OVER)
        key: Callable[[LayerChange], Any] = {
            "all": lambda row: None,
            "layers": lambda row: row.step,
            "steps": lambda row: row.label,
        }[over]
        groups: dict[Any, list[LayerChange]] = {}
        for row in _points(self.rows):
            groups.setdefault(key(row), []).append(row)
        found = [_pearson([row.direction for row in each], [row.magnitude for row in each]) for each in groups.values()]
        known = [value for value in found if not math.isnan(value)]
        return sum(known) / len(known) if known else math.nan

    def summary(self) -> dict[str, float]:
        """Return the means over the layers of the last step, by the names of logs."""
        rows = self._last()
        return {
            f"weights/{name}": sum(map(value, rows)) / len(rows) if rows else math.nan
            for name, value in (
                ("magnitude", lambda row: row.magnitude),
                ("direction", lambda row: row.direction),
                ("update", lambda row: row.update),
            )
        }

    def to_dict(self) -> dict[str, Any]:
        """Return everything as numbers, strings, lists and dictionaries, as JSON takes them (NaN
        and infinity as None).
        """
        rows = [asdict(row) | {"adapters": list(row.adapters), "update": row.update} for row in self.rows]
        numbers = [{name: _json(value) for name, value in row.items()} for row in rows]
        return {
            "schema": 1,
            "axis": self.axis,
            "steps": list(self.steps),
            "correlation": {over: _json(self.correlation(over)) for over in OVER},
            "layers": numbers,
            "left": [asdict(each) for each in self.left],
        }

    @property
    def headline(self) -> str:
        """How many layers and steps there are, and how ΔM goes with ΔD, in one line."""
        steps = f" at {len(self.steps)} steps" if len(self.steps) > 1 else ""
        count = len({row.label for row in self.rows})
        text = f"{count} weight{'' if count == 1 else 's'} measured{steps}"
        correlation = self.correlation()
        if not math.isnan(correlation):
            text += f", correlation of ΔD and ΔM {correlation:+.2f}"
        return text + (f"; {len(self.left)} left out" if self.left else "")

    def table(self) -> Any:
        """Return a `rich.table.Table` of the last step, one row a weight.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("the table of weight changes needs rich: pip install rich") from error
        table = Table(title=self.headline)
        for column in _COLUMNS:
            table.add_column(column, justify="left" if column in _COLUMNS[:2] else "right", overflow="fold")
        for row in self._last():
            table.add_row(*_cells(row))
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Return the paper's figure: ΔM against ΔD, a point for each weight and step, a colour for
        each kind of layer, a marker for each step, and the line through all points.

        Args:
            path: Where to save it; None: nowhere.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the plot of weight changes needs matplotlib: pip install matplotlib") from error
        figure = Figure(figsize=(6.4, 4.8), layout="constrained")
        axes = figure.subplots()
        points = _points(self.rows)
        kinds, steps = list(dict.fromkeys(map(_kind, points))), list(dict.fromkeys(row.step for row in points))
        for row in points:
            marker = _MARKERS[steps.index(row.step) % len(_MARKERS)]
            axes.scatter(row.direction, row.magnitude, color=f"C{kinds.index(_kind(row)) % 10}", marker=marker, s=24)
        for place, kind in enumerate(kinds[:10]):
            axes.scatter([], [], color=f"C{place % 10}", label=kind)
        for place, step in enumerate(steps if len(steps) > 1 else []):
            axes.scatter([], [], color="grey", marker=_MARKERS[place % len(_MARKERS)], label=f"step {step}")
        line = _line([row.direction for row in points], [row.magnitude for row in points])
        if line is not None:
            ends = [min(row.direction for row in points), max(row.direction for row in points)]
            axes.plot(ends, [line[0] + line[1] * end for end in ends], color="grey", linewidth=1, linestyle="--")
        axes.set_xlabel("ΔD, mean of 1 − cos")
        axes.set_ylabel("ΔM, mean of |change of length|")
        axes.ticklabel_format(axis="both", style="sci", scilimits=(-3, 3))
        if points:
            axes.legend(fontsize=7, frameon=False)
        figure.suptitle(self.headline, fontsize=9)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    def __str__(self) -> str:
        rows = [_COLUMNS, *map(_cells, self._last())]
        widths = [max(len(row[place]) for row in rows) for place in range(len(_COLUMNS))]
        lines = [self.headline]
        if len(self.steps) > 1:
            lines.append(f"  at step {self.rows[-1].step}:")
        for row in rows if len(rows) > 1 else []:
            cells = [
                cell.ljust(width) if place < 2 else cell.rjust(width)
                for place, (cell, width) in enumerate(zip(row, widths, strict=True))
            ]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"  left out {each.name}: {each.reason}" for each in self.left]
        return "\n".join(lines)

    def _last(self) -> list[LayerChange]:
        """Return the rows of the step that came last."""
        return [row for row in self.rows if row.step == self.rows[-1].step]


_COLUMNS = ("layer", "method", "ΔM", "ΔD", "|ΔW|/|W|", "bound")
_MARKERS = "ov^sDP*X"


def _cells(row: LayerChange) -> tuple[str, ...]:
    bound = "-" if row.bound is None else f"{row.update_norm / row.bound:.0%} of it" if row.bound else "0"
    return row.label, row.method, f"{row.magnitude:.3g}", f"{row.direction:.3g}", f"{row.update:.3g}", bound


def _kind(row: LayerChange) -> str:
    """Return the last part of a name: what is plotted in one colour."""
    return row.name.rpartition(".")[2]


def _points(rows: Iterable[LayerChange]) -> list[LayerChange]:
    return [row for row in rows if row.update_norm > 0 and not math.isnan(row.direction + row.magnitude)]


def _pearson(x: list[float], y: list[float]) -> float:
    xx, xy, yy = _moments(x, y)
    return math.nan if len(x) < 3 or xx <= 0 or yy <= 0 else max(-1.0, min(1.0, xy / math.sqrt(xx) / math.sqrt(yy)))


def _line(x: list[float], y: list[float]) -> tuple[float, float] | None:
    """Intercept and slope of the least squares line."""
    xx, xy, _ = _moments(x, y)
    if len(x) < 3 or xx <= 0:
        return None
    return sum(y) / len(y) - xy / xx * sum(x) / len(x), xy / xx


def _moments(x: list[float], y: list[float]) -> tuple[float, float, float]:
    mean_x, mean_y = (sum(each) / max(1, len(each)) for each in (x, y))
    dx, dy = [value - mean_x for value in x], [value - mean_y for value in y]
    return tuple(sum(a * b for a, b in zip(*pair, strict=True)) for pair in ((dx, dx), (dx, dy), (dy, dy)))  # type: ignore[return-value]


def _json(value: Any) -> Any:
    return None if isinstance(value, float) and not math.isfinite(value) else value
