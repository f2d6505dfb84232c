"""DoRA's analysis: over layers and steps, do changes of direction and of magnitude go together?

The paper (section 3.2, figure 2) takes the query matrices of six layers at four steps, and finds
them go together for LoRA, and against each other for full fine-tuning and DoRA. ΔM and ΔD are those
of `dk.weight_changes`. Both grow while a model trains, so the correlation within a step, over the
layers alone, is judged too.
"""

import math
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import CANNOT_TELL, LEAST_CORRELATION, Rules, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.task import TARGETS
from benchmarks.claims.training import Run
from delora_kernels.integrations.peft.changes import LayerChange, WeightChanges

METHODS = ("full", "lora", "dora", "delora")
QUARTERS = 4


class Points(NamedTuple):
    """Which pairs (ΔD, ΔM) a correlation is over.

    Attributes:
        said: in words.
        kinds: last parts of the layers' names.
        over: as `WeightChanges.correlation` takes it.
    """

    said: str
    kinds: tuple[str, ...]
    over: str


POINTS = (
    Points("query and value, over layers and steps", ("query", "value"), "all"),
    Points("all linears, over the layers of a step", TARGETS, "layers"),
)

PAPER = "full −0.62, LoRA +0.83, DoRA −0.31 (query matrices, section 4.1)"


def marks(rules: Rules) -> tuple[int, ...]:
    """Return the four steps at which weights are measured: each quarter of a run."""
    return tuple(sorted({max(1, round(rules.steps * part / QUARTERS)) for part in range(1, QUARTERS + 1)}))


def run(sweep: Sweep, seed: int) -> Run:
    """Return a method's run at its chosen rate, its weights measured at each mark."""
    return sweep.run(sweep.chosen, seed, marks=marks(sweep.rules), watch=("changes",))


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the sweeps, then the runs that are measured."""
    sweeps = [Sweep(record, rules, row) for row in METHODS]
    ready = [sweep for sweep in sweeps if sweep.complete]
    return [each for sweep in sweeps for each in sweep.runs] + [run(s, seed) for s in ready for seed in rules.seeds]


def changes(sweep: Sweep, seed: int) -> WeightChanges:
    """Return what was measured in one run, as `weight_changes` gives it."""
    found: list[dict[str, Any]] = sweep.record[run(sweep, seed)]["watched"]["changes"]
    rows = [
        LayerChange(name, sweep.row, (), None, step, m, d, update, weight, 0.0, 0, 0)
        for step, layers in zip(marks(sweep.rules), found, strict=True)
        for name, (m, d, update, weight) in layers.items()
    ]
    return WeightChanges(tuple(rows))


def correlation(sweep: Sweep, seed: int, points: Points) -> float:
    """Return one seed's correlation of ΔD and ΔM; NaN where there is none."""
    return changes(sweep, seed).of(*(f".{kind}" for kind in points.kinds)).correlation(points.over)


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the signs, and which of LoRA and DoRA is nearer to full fine-tuning."""
    sweeps = {row: Sweep(record, rules, row) for row in METHODS}
    return [line for points in POINTS for line in _lines(sweeps, rules, points)]


def _lines(sweeps: dict[str, Sweep], rules: Rules, points: Points) -> list[Line]:
    claims = {
        "LoRA: ΔD and ΔM go together": ("lora",),
        "full fine-tuning: ΔD and ΔM go against each other": ("full",),
        "DoRA: ΔD and ΔM go against each other": ("dora",),
        "DoRA's correlation is below LoRA's": ("dora", "lora"),
        "DoRA's correlation is nearer to full fine-tuning's than LoRA's is": ("dora", "lora", "full"),
        "DeLoRA's correlation is below LoRA's": ("delora", "lora"),
    }
    made = []
    for claim, rows in claims.items():
        claimed = f"{claim} ({points.said})"
        paper = "not in the paper" if "delora" in rows else PAPER
        cannot = incomplete([sweeps[row] for row in rows])
        if not cannot and not all(run(sweeps[row], seed) in sweeps[row].record for row in rows for seed in rules.seeds):
            cannot = f"{CANNOT_TELL}: incomplete (measured runs)"
        if cannot:
            made.append(Line(claimed, paper, "", cannot))
            continue
        r = {row: [correlation(sweeps[row], seed, points) for seed in rules.seeds] for row in rows}
        if any(math.isnan(value) for values in r.values() for value in values):
            made.append(Line(claimed, paper, "", f"{CANNOT_TELL}: a run has no correlation"))
            continue
        judged = _judged(rows, r)
        means = ", ".join(f"{ROWS[row].label} {interval(values).mean:+.2f}" for row, values in r.items())
        said = means if len(rows) > 1 else f"{interval(r[rows[0]])}"
        ours = f"{said}: {interval(judged)}" if len(rows) > 1 else said
        made.append(Line(claimed, paper, ours, more(judged, LEAST_CORRELATION)))
    return made


def _judged(rows: tuple[str, ...], r: dict[str, list[float]]) -> list[float]:
    """Return for each seed what is above 0 where the claim holds."""
    if len(rows) == 1:
        return r[rows[0]] if rows[0] == "lora" else [-value for value in r[rows[0]]]
    ours, lora = r[rows[0]], r["lora"]
    if len(rows) == 2:
        return [b - a for a, b in zip(ours, lora, strict=True)]
    return [abs(b - full) - abs(a - full) for a, b, full in zip(ours, lora, r["full"], strict=True)]


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw ΔM against ΔD, a point for each linear, step and seed, a panel for each method."""
    sweeps = [sweep for row in METHODS if (sweep := Sweep(record, rules, row)).complete]
    sweeps = [sweep for sweep in sweeps if all(run(sweep, seed) in record for seed in rules.seeds)]
    if not sweeps:
        return None
    figure = figures.page(2.9 * len(sweeps), 3.2)
    panels = figure.subplots(1, len(sweeps), squeeze=False)[0]
    for axes, sweep in zip(panels, sweeps, strict=True):
        for place, step in enumerate(marks(rules)):
            rows = [row for seed in rules.seeds for row in changes(sweep, seed).rows if row.step == step]
            for kinds, marker in ((("query", "value"), "o"), (("key", "out", "up", "down"), "x")):
                some = [row for row in rows if row.name.rpartition(".")[2] in kinds]
                label = f"step {step}" if marker == "o" else None
                shade = 0.75 - 0.75 * place / QUARTERS
                axes.scatter(
                    [row.direction for row in some],
                    [row.magnitude for row in some],
                    s=12,
                    marker=marker,
                    color=(shade, shade, 1.0 - 0.2 * (1 - shade)),
                    label=label,
                )
        r = [correlation(sweep, seed, POINTS[0]) for seed in rules.seeds]
        axes.set_title(f"{sweep.label}: {interval(r).mean:+.2f}", fontsize=9)
        axes.set_xlabel("ΔD, mean of 1 − cos")
        axes.ticklabel_format(axis="both", style="sci", scilimits=(-2, 3))
        axes.tick_params(labelsize=7)
    panels[0].set_ylabel("ΔM, mean of |change of length|")
    panels[0].legend(fontsize=7, frameon=False, title="o query, value; x others", title_fontsize=7)
    return figures.finished(figure, rules)


CLAIM = Claim(
    "dora-pattern",
    "DoRA: magnitude against direction",
    "Liu et al., arXiv:2402.09353, sections 3.2 and 4.1, figure 2",
    2,
    runs,
    lines,
    draw,
)
