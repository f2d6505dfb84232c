"""DeLoRA trained up to ten times as long: what becomes of the score, and of ‖ΔW‖_F / ‖W‖_F.

The paper (section 3.4, figure 3) sees LoRA's and DoRA's weights depart from the pretrained ones all
the time, pass the best and diverge, DeLoRA's reach their boundary soon and stay.
"""

import math

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rules import CANNOT_TELL, LEAST_DOUBLINGS, LEAST_SCORE, Rules, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

METHODS = ("lora", "delora", "dora", "delora-paper", "ether+", "full")
DELORA = ("delora", "delora-paper")
UNBOUNDED = ("lora", "dora")
FACTORS = (0, 2)
"""q of the long runs above the chosen rate: at it, and half a decade (3.2x) above."""

MOST_DOUBLINGS = 20.0
"""What a growth counts at most, and where the weights are no longer finite."""

SEES = "figure 3: LoRA and DoRA depart all the time, DeLoRA reaches its boundary and stays"


def marks(rules: Rules) -> tuple[int, ...]:
    """Return the steps after which a long run is scored and its weights measured."""
    return tuple(rules.steps * times for times in (0, *range(1, rules.long + 1)))


def long_run(sweep: Sweep, factor: int, seed: int) -> Run:
    """Return one method's long run, at `factor` quarter decades above its chosen rate."""
    rules = sweep.rules
    settings = {"steps": rules.steps * rules.long, "marks": marks(rules), "watch": ("norms",)}
    return sweep.run(sweep.chosen + factor, seed, **settings)


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the sweeps, then the long runs at the chosen rate, then those above it."""
    sweeps = [Sweep(record, rules, row) for row in METHODS]
    ready = [sweep for sweep in sweeps if sweep.complete]
    return [run for sweep in sweeps for run in sweep.runs] + [
        long_run(sweep, factor, seed) for factor in FACTORS for seed in rules.seeds for sweep in ready
    ]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the loss of score, and the growth of ‖ΔW‖, from the usual budget to the last mark."""
    made = []
    for factor in FACTORS:
        where = "its best rate" if not factor else f"{10 ** (factor / 4):.1f}x its best rate"
        for ours in DELORA:
            for rival in UNBOUNDED:
                made += _lines(Sweep(record, rules, ours), Sweep(record, rules, rival), factor, where)
    return made


def _lines(a: Sweep, b: Sweep, factor: int, where: str) -> list[Line]:
    rules = a.rules
    claims = (
        f"{a.label} loses less than {b.label} by training {rules.long}x as long, at {where}",
        f"‖ΔW‖ of {a.label} grows less than that of {b.label} from then on, at {where}",
    )
    cannot = incomplete((a, b))
    if not cannot and not all(long_run(s, factor, seed) in s.record for s in (a, b) for seed in rules.seeds):
        cannot = f"{CANNOT_TELL}: incomplete (long runs)"
    if cannot:
        return [Line(claim, SEES, "", cannot) for claim in claims]
    losses, growths = ([[of(s, factor, seed) for seed in rules.seeds] for s in (a, b)] for of in (_loss, _growth))
    made = []
    for claim, (mine, theirs), least, unit in zip(
        claims, (losses, growths), (LEAST_SCORE, LEAST_DOUBLINGS), ("of accuracy", "doublings"), strict=True
    ):
        apart = [y - x for x, y in zip(mine, theirs, strict=True)]
        ours = f"{interval(mine).mean:+.3f} and {interval(theirs).mean:+.3f} {unit}: {interval(apart)}"
        made.append(Line(claim, SEES, ours, more(apart, least)))
    return made


def _loss(sweep: Sweep, factor: int, seed: int) -> float:
    scores = sweep.record[long_run(sweep, factor, seed)]["test"]
    return float(scores[1] - scores[-1])


def _growth(sweep: Sweep, factor: int, seed: int) -> float:
    norms = sweep.record[long_run(sweep, factor, seed)]["watched"]["norms"]
    if norms[-1] is None:  # no longer finite
        return MOST_DOUBLINGS
    return min(MOST_DOUBLINGS, math.log2(norms[-1] / norms[1])) if norms[1] else 0.0


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw score and ‖ΔW‖_F / ‖W‖_F over the steps, at both rates."""
    figure = figures.page(9.0, 6.0)
    panels = figure.subplots(2, len(FACTORS), sharex=True, sharey="row")
    drawn = False
    for row in METHODS:
        sweep = Sweep(record, rules, row)
        if not sweep.complete:
            continue
        for column, factor in enumerate(FACTORS):
            there = [long_run(sweep, factor, seed) for seed in rules.seeds]
            found = [record[run] for run in there if run in record]
            if not found:
                continue
            drawn = True
            norms = [[value if value is not None else math.nan for value in one["watched"]["norms"]] for one in found]
            for axes, curves in zip(panels[:, column], ([one["test"] for one in found], norms), strict=True):
                means = [sum(values) / len(values) for values in zip(*curves, strict=True)]
                axes.plot(marks(rules), means, label=sweep.label, **figures.style(row))
    if not drawn:
        return None
    for column, factor in enumerate(FACTORS):
        panels[0, column].set_title("chosen rate" if not factor else f"{10 ** (factor / 4):.1f}x as high", fontsize=9)
        panels[1, column].set_xlabel("steps")
        panels[1, column].set_yscale("log")
    panels[0, 0].set_ylabel("test accuracy")
    panels[1, 0].set_ylabel("‖ΔW‖_F / ‖W‖_F")
    panels[0, 0].legend(frameon=False, fontsize=7)
    return figures.finished(figure, rules)


CLAIM = Claim(
    "delora-long",
    "DeLoRA: robust to long training",
    "Bini et al., arXiv:2503.18225, section 3.4, figure 3",
    60,
    runs,
    lines,
    draw,
)
