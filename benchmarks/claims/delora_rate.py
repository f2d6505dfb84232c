"""DeLoRA over learning rates: how wide the range is in which a method stays near its best, how far
it drops above it, and how good its best is.

The paper (section 3.4, figure 2) varies the rate by factors of a base rate, and sees LoRA and DoRA
degrade at 4x, DeLoRA as robust as ETHER+.
"""

from collections.abc import Callable

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import (
    ABOVE,
    CANNOT_TELL,
    LEAST_DECADES,
    LEAST_DROP,
    LEAST_SCORE,
    Rules,
    censored,
    interval,
    more,
    no_less,
    rate,
)
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

METHODS = ("lora", "delora", "dora", "delora-paper", "ether+", "full", "rslora", "ether", "mixture", "goat")
DELORA = ("delora", "delora-paper")
UNBOUNDED = ("lora", "dora")
SEES = "figure 2: LoRA and DoRA degrade at 4x, DeLoRA is as robust as ETHER+"


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return pilot and sweep of every method."""
    return [run for row in METHODS for run in Sweep(record, rules, row).runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge width, drop and best score of both DeLoRAs against the others."""
    sweeps = {row: Sweep(record, rules, row) for row in METHODS}
    made = []
    for ours in DELORA:
        for rival in UNBOUNDED:
            a, b = sweeps[ours], sweeps[rival]
            made += [_wider(a, b, rules), _drops_less(a, b, rules)]
        made.append(_as_wide(sweeps[ours], sweeps["ether+"], rules))
        made += [scores(sweeps[ours], sweeps[rival], rules) for rival in UNBOUNDED]
    return made


def _widths(sweep: Sweep, rules: Rules) -> tuple[list[float], bool]:
    found = [sweep.width(seed) for seed in rules.seeds]
    return [width for width, _ in found], any(reached for _, reached in found)


def compared(a: Sweep, b: Sweep, rules: Rules, of: Callable[[Sweep, int], float]) -> list[float]:
    """Return a's number less b's, of each seed."""
    return [of(a, seed) - of(b, seed) for seed in rules.seeds]


def _judged_widths(claimed: str, a: Sweep, b: Sweep, rules: Rules, judge: Callable[[list[float], float], str]) -> Line:
    if cannot := incomplete((a, b)):
        return Line(claimed, SEES, "", cannot)
    (wide, a_open), (narrow, b_open) = _widths(a, rules), _widths(b, rules)
    found = interval([x - y for x, y in zip(wide, narrow, strict=True)])
    ours = f"{'≥ ' * a_open}{interval(wide).mean:.2f} and {'≥ ' * b_open}{interval(narrow).mean:.2f} decades: {found}"
    verdict = judge([x - y for x, y in zip(wide, narrow, strict=True)], LEAST_DECADES)
    return Line(claimed, SEES, ours, censored(verdict, a_open, b_open))


def _wider(a: Sweep, b: Sweep, rules: Rules) -> Line:
    return _judged_widths(f"{a.label}: a wider range of rates near its best than {b.label}", a, b, rules, more)


def _as_wide(a: Sweep, b: Sweep, rules: Rules) -> Line:
    claimed = f"{a.label}: a range of rates near its best no narrower than {b.label}"
    return _judged_widths(claimed, a, b, rules, no_less)


def _drops_less(a: Sweep, b: Sweep, rules: Rules) -> Line:
    claimed = f"{a.label} loses less at {ABOVE:g}x its best rate than {b.label}"
    if cannot := incomplete((a, b)):
        return Line(claimed, SEES, "", cannot)
    if short := [sweep.label for sweep in (a, b) if not sweep.reaches(ABOVE)]:
        return Line(claimed, SEES, "", f"{CANNOT_TELL}: {ABOVE:g}x is outside the sweep ({', '.join(short)})")

    def drop(sweep: Sweep, seed: int) -> float:
        best = sweep.test(seed)
        return (best - sweep.at(seed, ABOVE)) / best if best else 0.0

    means = [interval([drop(sweep, seed) for seed in rules.seeds]).mean for sweep in (a, b)]
    saved = compared(b, a, rules, drop)
    ours = f"loses {means[0]:.1%} and {means[1]:.1%} of its score: {interval(saved)}"
    return Line(claimed, SEES, ours, more(saved, LEAST_DROP))


def scores(a: Sweep, b: Sweep, rules: Rules) -> Line:
    claimed = f"{a.label} scores no less than {b.label}, each at its best rate"
    paper = "GLUE 85.6, LoRA 84.7 (table 4); DINO .686, LoRA .686, DoRA .687 (table 3)"
    if cannot := incomplete((a, b)):
        return Line(claimed, paper, "", cannot)
    means = [interval([sweep.test(seed) for seed in rules.seeds]).mean for sweep in (a, b)]
    gained = compared(a, b, rules, lambda sweep, seed: sweep.test(seed))
    return Line(claimed, paper, f"{means[0]:.3f} and {means[1]:.3f}: {interval(gained)}", no_less(gained, LEAST_SCORE))


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw score against the rate as a factor of the chosen one, and the widths."""
    sweeps = [sweep for row in METHODS if (sweep := Sweep(record, rules, row)).complete]
    if not sweeps:
        return None
    figure = figures.page(11.0, 4.6)
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for sweep in sweeps:
        factors = [rate(q - sweep.chosen) for q in sweep.rates]
        scores = [interval([sweep.test(seed, q) for seed in rules.seeds]).mean for q in sweep.rates]
        left.plot(factors, scores, label=f"{sweep.label} ({rate(sweep.chosen):.1e})", **figures.style(sweep.row))
    left.axvline(ABOVE, color="0.7", linestyle=":")
    left.set(xscale="log", xlabel="learning rate over the chosen one (in brackets)", ylabel="test accuracy")
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=7)
    for place, sweep in enumerate(sweeps):
        widths, reached = _widths(sweep, rules)
        colour = figures.style(sweep.row)["color"]
        right.plot(widths, [place] * len(widths), "o", color=colour, alpha=0.5)
        right.plot(interval(widths).mean, place, "|", color="black", markersize=14)
        if reached:
            right.annotate("at least", (max(widths), place), (6, -3), textcoords="offset points", fontsize=7)
    right.set_yticks(range(len(sweeps)), [ROWS[sweep.row].label for sweep in sweeps])
    right.invert_yaxis()
    right.set_xlabel("decades within 5 % of the best score")
    return figures.finished(figure, rules)


CLAIM = Claim(
    "delora-rate",
    "DeLoRA: robust to the learning rate",
    "Bini et al., arXiv:2503.18225, section 3.4, figure 2; tables 3 and 4",
    80,
    runs,
    lines,
    draw,
)
