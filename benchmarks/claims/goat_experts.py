"""GOAT: are all experts used, and how evenly, while it trains?

The paper (section 4.7, figure 7) sees no inactive expert, and loads within 15 % of an even share.
Routers are counted over the validation data.
"""

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rules import CANNOT_TELL, DOES_NOT, HOLDS, Rules, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

METHODS = ("goat", "mixture")
WITHIN = 0.15
TENTHS = 10
SEES = "no inactive experts, loads within 15 % (figure 7)"


def marks(rules: Rules) -> tuple[int, ...]:
    """Return the steps at which routers are counted: the start, and each tenth of a run."""
    return tuple(sorted({round(rules.steps * tenth / TENTHS) for tenth in range(TENTHS + 1)}))


def run(sweep: Sweep, seed: int) -> Run:
    """Return a method's run at its chosen rate, its routers counted at each mark."""
    return sweep.run(sweep.chosen, seed, marks=marks(sweep.rules), watch=("experts",))


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the sweeps, then the runs that are watched."""
    sweeps = [Sweep(record, rules, row) for row in METHODS]
    ready = [sweep for sweep in sweeps if sweep.complete]
    return [each for sweep in sweeps for each in sweep.runs] + [run(s, seed) for s in ready for seed in rules.seeds]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Say how many experts are dead at any mark, and how far a load is from an even share."""
    made = []
    for row in METHODS:
        sweep = Sweep(record, rules, row)
        paper = SEES if row == "goat" else "not in the paper"
        claims = (
            f"{sweep.label}: no expert of any layer is dead, from the start to the end",
            f"{sweep.label}: each expert's load, over all layers, is within {WITHIN:.0%} of an even share at the end",
        )
        cannot = incomplete([sweep])
        if not cannot and not all(run(sweep, seed) in record for seed in rules.seeds):
            cannot = f"{CANNOT_TELL}: incomplete (watched runs)"
        if cannot:
            made += [Line(claim, paper, "", cannot) for claim in claims]
            continue
        seen = [record[run(sweep, seed)]["watched"]["experts"] for seed in rules.seeds]
        dead = [max(mark["dead"] for mark in each) for each in seen]
        ours = f"at most {max(dead)} of {seen[0][0]['experts']} dead, in {len(seen)} runs"
        made.append(Line(claims[0], paper, ours, HOLDS if max(dead) == 0 else DOES_NOT))
        apart = [max(abs(share - 1) for share in each[-1]["shares"]) for each in seen]
        worst = max(each[-1]["farthest"] for each in seen)
        ours = f"{interval(apart)} away; of a single layer at most {worst:.2f}"
        made.append(Line(claims[1], paper, ours, more([WITHIN - each for each in apart], 0.0)))
    return made


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw balance and the part of dead experts over the steps, a line a seed."""
    sweeps = [sweep for row in METHODS if (sweep := Sweep(record, rules, row)).complete]
    sweeps = [sweep for sweep in sweeps if all(run(sweep, seed) in record for seed in rules.seeds)]
    if not sweeps:
        return None
    figure = figures.page(8.0, 3.2)
    left, right = figure.subplots(1, 2, sharex=True)
    for sweep in sweeps:
        for seed in rules.seeds:
            seen = record[run(sweep, seed)]["watched"]["experts"]
            style = figures.style(sweep.row) | {"label": sweep.label if seed == rules.seeds[0] else None, "alpha": 0.6}
            left.plot(marks(rules), [mark["balance"] for mark in seen], **style)
            right.plot(marks(rules), [mark["dead"] / mark["experts"] for mark in seen], **style)
    left.set(xlabel="step", ylabel="balance (1 is even)")
    right.set(xlabel="step", ylabel="part of the experts that is dead", ylim=(-0.02, None))
    left.legend(frameon=False)
    return figures.finished(figure, rules)


CLAIM = Claim(
    "goat-experts",
    "GOAT: what its experts do",
    "Fan et al., arXiv:2502.16894, section 4.7, figure 7",
    2,
    runs,
    lines,
    draw,
    core=False,
)
