"""DeLoRA's components, one after the other: from LoRA, and from ETHER+ on one side.

The rungs are those of docs/family.md. From LoRA: normalisation with a bound (one n for all layers,
the mean of their column norms), then weight-norm scaling. From ETHER+: a controllable scale, rank,
relaxed vectors, additive. Each rung is swept like a method, so that the table says of each what it
adds to the score and to the width of the range of rates.
"""

import itertools

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import LEAST_DECADES, LEAST_SCORE, Rules, censored, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

FROM_LORA = ("lora", "normalised", "delora")
FROM_ETHER = ("ether+output", "scaled", "ranked", "relaxed", "delora-paper")
RUNGS = (*FROM_LORA, *FROM_ETHER)

# What the paper's table 1 has of each rung: DINO.
DINO = {
    "lora": 0.674,
    "normalised": 0.682,
    "delora": 0.701,
    "ether+output": 0.624,
    "scaled": 0.678,
    "ranked": 0.685,
    "relaxed": 0.696,
    "delora-paper": 0.701,
}


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return pilot and sweep of every rung; DeLoRA's and LoRA's are other claims' too."""
    return [run for row in RUNGS for run in Sweep(record, rules, row).runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Say what each rung adds to the one before it: score, width."""
    made = []
    for rungs in (FROM_LORA, FROM_ETHER):
        for before, after in itertools.pairwise(rungs):
            made += _step(Sweep(record, rules, before), Sweep(record, rules, after))
    return made


def _step(before: Sweep, after: Sweep) -> list[Line]:
    seeds = before.rules.seeds
    claims = (f"{after.label} scores more than {before.label}", f"{after.label}: a wider range than {before.label}")
    papers = (f"DINO {DINO[after.row]:.3f} after {DINO[before.row]:.3f} (table 1)", "not in the paper")
    if cannot := incomplete((before, after)):
        return [Line(claim, paper, "", cannot) for claim, paper in zip(claims, papers, strict=True)]
    scores = [[sweep.test(seed) for seed in seeds] for sweep in (after, before)]
    widths = [[sweep.width(seed) for seed in seeds] for sweep in (after, before)]
    gained = [a - b for a, b in zip(*scores, strict=True)]
    widened = [a - b for (a, _), (b, _) in zip(*widths, strict=True)]
    a_open, b_open = (any(reached for _, reached in found) for found in widths)
    means = [interval(values).mean for values in (*scores, *([width for width, _ in found] for found in widths))]
    return [
        Line(
            claims[0],
            papers[0],
            f"{means[0]:.3f} and {means[1]:.3f}: {interval(gained)}",
            more(gained, LEAST_SCORE),
        ),
        Line(
            claims[1],
            papers[1],
            f"{'≥ ' * a_open}{means[2]:.2f} and {'≥ ' * b_open}{means[3]:.2f} decades: {interval(widened)}",
            censored(more(widened, LEAST_DECADES), a_open, b_open),
        ),
    ]


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw score and width of every rung, a dot a seed, from LoRA down to DeLoRA and up to it from
    ETHER+.
    """
    order = (*FROM_LORA, *reversed(FROM_ETHER))
    sweeps = [Sweep(record, rules, row) for row in order]
    if not any(sweep.complete for sweep in sweeps):
        return None
    figure = figures.page(10.0, 3.8)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, sweep in enumerate(sweeps):
        if not sweep.complete:
            continue
        for axes, values in (
            (left, [sweep.test(seed) for seed in rules.seeds]),
            (right, [sweep.width(seed)[0] for seed in rules.seeds]),
        ):
            axes.plot(values, [place] * len(values), "o", color=figures.style(sweep.row)["color"], alpha=0.5)
            axes.plot(interval(values).mean, place, "|", color="black", markersize=14)
    left.set_yticks(range(len(order)), [ROWS[row].label for row in order])
    left.invert_yaxis()
    left.set_xlabel("test accuracy at the chosen rate")
    right.set_xlabel("decades of the rate within 5 % of the best score")
    return figures.finished(figure, rules)


CLAIM = Claim(
    "delora-ladder",
    "DeLoRA: what each component adds",
    "Bini et al., arXiv:2503.18225, section 3.2, tables 1 and 2",
    35,
    runs,
    lines,
    draw,
    core=False,
)
