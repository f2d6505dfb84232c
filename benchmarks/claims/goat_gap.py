"""GOAT: how much of the gap from LoRA to full fine-tuning is closed, and what its theoretical scale
and its start from singular vectors add.

Each form is swept by itself, so that a scale can't stand in for a learning rate. The scale is
derived for η = 1, adapters that train at full fine-tuning's own rate: at that rate all are compared
once more.
"""

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import CANNOT_TELL, LEAST_SCORE, Rules, interval, more, no_less
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

FORMS = ("lora", "mixture", "mixture-theory", "goat-alpha", "goat")
METHODS = ("full", *FORMS)

PAPER = {"full": 82.25, "lora": 77.09, "mixture": 80.26, "mixture-theory": 81.06, "goat-alpha": 80.35, "goat": 81.49}
"""Average accuracy of CLIP's vision transformer on seven sets, in the paper's tables 1 and 5."""

PAIRS = (
    ("GOAT scores more than LoRA", "goat", "lora"),
    ("GOAT scores more than the LoRA mixture", "goat", "mixture"),
    ("the theoretical scale adds to the LoRA mixture", "mixture-theory", "mixture"),
    ("the theoretical scale adds to the SVD start", "goat", "goat-alpha"),
    ("the SVD start adds to the theoretical scale", "goat", "mixture-theory"),
    ("the SVD start adds to α/r", "goat-alpha", "mixture"),
)


def at_fulls_rate(record: Record, rules: Rules, row: str, seed: int) -> Run:
    """Return a form's run at full fine-tuning's chosen rate."""
    return Sweep(record, rules, row).run(Sweep(record, rules, "full").chosen, seed)


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the sweeps, then the runs at full fine-tuning's rate."""
    wanted = [run for row in METHODS for run in Sweep(record, rules, row).runs]
    if Sweep(record, rules, "full").complete:
        wanted += [at_fulls_rate(record, rules, row, seed) for row in FORMS for seed in rules.seeds]
    return wanted


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the gap, then scale and start at each form's own best rate and at full
    fine-tuning's.
    """
    sweeps = {row: Sweep(record, rules, row) for row in METHODS}
    made = [_reaches(sweeps, rules)]
    for claim, ours, rival in PAIRS:
        paper = f"{PAPER[ours]:.2f} and {PAPER[rival]:.2f} (ViT, tables 1 and 5)"
        cannot = incomplete((sweeps[ours], sweeps[rival]))
        claimed = f"{claim}, each at its own rate"
        if cannot:
            made.append(Line(claimed, paper, "", cannot))
        else:
            scores = [[sweeps[row].test(seed) for seed in rules.seeds] for row in (ours, rival)]
            made.append(_more(claimed, paper, scores))
        claimed = f"{claim}, both at full fine-tuning's rate"
        cannot = incomplete([sweeps["full"]])
        if not cannot:
            at = [[at_fulls_rate(record, rules, row, seed) for seed in rules.seeds] for row in (ours, rival)]
            lacks = not all(run in record for each in at for run in each)
            cannot = f"{CANNOT_TELL}: incomplete (runs at full fine-tuning's rate)" if lacks else None
        if cannot:
            made.append(Line(claimed, "not in the paper", "", cannot))
        else:
            scores = [[float(record[run]["test"][-1]) for run in each] for each in at]
            made.append(_more(claimed, "not in the paper", scores))
    return made


def _reaches(sweeps: dict[str, Sweep], rules: Rules) -> Line:
    claimed, paper = "GOAT scores no less than full fine-tuning", "99.07 % of it (81.49, 82.25; ViT, table 1)"
    three = [sweeps[row] for row in ("goat", "full", "lora")]
    if cannot := incomplete(three):
        return Line(claimed, paper, "", cannot)
    goat, full, lora = ([sweep.test(seed) for seed in rules.seeds] for sweep in three)
    apart = [a - b for a, b in zip(goat, full, strict=True)]
    gap = interval(full).mean - interval(lora).mean
    closed = f"; closes {(interval(goat).mean - interval(lora).mean) / gap:.0%} of LoRA's gap" if gap > 0 else ""
    ours = f"{interval(goat).mean:.3f} and {interval(full).mean:.3f}: {interval(apart)}{closed}"
    return Line(claimed, paper, ours, no_less(apart, LEAST_SCORE))


def _more(claimed: str, paper: str, scores: list[list[float]]) -> Line:
    apart = [a - b for a, b in zip(*scores, strict=True)]
    ours = f"{interval(scores[0]).mean:.3f} and {interval(scores[1]).mean:.3f}: {interval(apart)}"
    return Line(claimed, paper, ours, more(apart, LEAST_SCORE))


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw the scores of every form, a dot a seed, at its own rate and at full fine-tuning's."""
    sweeps = {row: Sweep(record, rules, row) for row in METHODS}
    if not any(sweep.complete for sweep in sweeps.values()):
        return None
    figure = figures.page(8.0, 3.2)
    panels = figure.subplots(1, 2, sharex=True, sharey=True)
    for place, row in enumerate(METHODS):
        own = [sweeps[row].test(seed) for seed in rules.seeds] if sweeps[row].complete else []
        there = []
        if sweeps["full"].complete:
            at = [at_fulls_rate(record, rules, row, seed) for seed in rules.seeds]
            there = [record[run]["test"][-1] for run in at if run in record]
        for axes, scores in zip(panels, (own, there), strict=True):
            if scores:
                axes.plot(scores, [place] * len(scores), "o", color=figures.style(row)["color"], alpha=0.5)
                axes.plot(interval(scores).mean, place, "|", color="black", markersize=14)
    panels[0].set_yticks(range(len(METHODS)), [ROWS[row].label for row in METHODS])
    panels[0].invert_yaxis()
    panels[0].set_xlabel("test accuracy, each at its own best rate")
    panels[1].set_xlabel("test accuracy, all at full fine-tuning's rate")
    return figures.finished(figure, rules)


CLAIM = Claim(
    "goat-gap",
    "GOAT: the gap to full fine-tuning",
    "Fan et al., arXiv:2502.16894, sections 3.3, 4.3 and 4.4, tables 1 and 5",
    30,
    runs,
    lines,
    draw,
    core=False,
)
