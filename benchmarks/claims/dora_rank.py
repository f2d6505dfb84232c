"""DoRA at half of LoRA's rank and at lower ones: each method swept at each rank by itself."""

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line, incomplete
from benchmarks.claims.record import Record
from benchmarks.claims.rules import LEAST_SCORE, Rules, interval, more, no_less
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

METHODS = ("lora", "dora")
HALVINGS = 3

HALF = "77.5 at half the rank, LoRA 74.7 (LLaMA-7B, table 1)"
RANKS = "DoRA 78.0, LoRA 40.7 at r = 8; 61.9, 39.5 at r = 4 (LLaMA-7B, figure 5)"


def ranks(rules: Rules) -> list[int]:
    """Return the study's rank and its halves down to an eighth."""
    return list(dict.fromkeys(max(1, rules.rank >> halving) for halving in range(HALVINGS + 1)))


def sweeps(record: Record, rules: Rules) -> dict[tuple[str, int], Sweep]:
    """Return the sweep of each method at each rank; at the study's they are other claims' too."""
    return {(row, rank): Sweep(record, rules, row, rank) for rank in ranks(rules) for row in METHODS}


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return pilot and sweep of each method at each rank."""
    return [run for sweep in sweeps(record, rules).values() for run in sweep.runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge DoRA at half the rank, at each rank, and how its lead goes with the rank."""
    found, least = sweeps(record, rules), min(ranks(rules))
    full, half = rules.rank, max(1, rules.rank // 2)
    made = [
        _line("DoRA at half the rank scores more than LoRA", HALF, found["dora", half], found["lora", full]),
        _line("DoRA at half the rank scores no less than LoRA", HALF, found["dora", half], found["lora", full], True),
    ]
    for rank in ranks(rules):
        claimed = f"DoRA scores more than LoRA, both at r = {rank}"
        made.append(_line(claimed, RANKS, found["dora", rank], found["lora", rank]))
    claimed = f"DoRA's lead over LoRA is larger at r = {least} than at r = {full}"
    four = [found[row, rank] for rank in (least, full) for row in ("dora", "lora")]
    if cannot := incomplete(four):
        return [*made, Line(claimed, RANKS, "", cannot)]
    leads = [[a.test(seed) - b.test(seed) for seed in rules.seeds] for a, b in (four[:2], four[2:])]
    grown = [low - high for low, high in zip(*leads, strict=True)]
    ours = f"{interval(leads[0]).mean:+.3f} and {interval(leads[1]).mean:+.3f}: {interval(grown)}"
    return [*made, Line(claimed, RANKS, ours, more(grown, LEAST_SCORE))]


def _line(claimed: str, paper: str, a: Sweep, b: Sweep, matches: bool = False) -> Line:
    if cannot := incomplete((a, b)):
        return Line(claimed, paper, "", cannot)
    scores = [[sweep.test(seed) for seed in sweep.rules.seeds] for sweep in (a, b)]
    apart = [x - y for x, y in zip(*scores, strict=True)]
    ours = f"{interval(scores[0]).mean:.3f} and {interval(scores[1]).mean:.3f}: {interval(apart)}"
    return Line(claimed, paper, ours, (no_less if matches else more)(apart, LEAST_SCORE))


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw the score at each method's chosen rate against the rank, a dot a seed."""
    found = {key: sweep for key, sweep in sweeps(record, rules).items() if sweep.complete}
    if not found:
        return None
    figure = figures.page(5.5, 3.6)
    axes = figure.subplots()
    for row in METHODS:
        at = [rank for rank in ranks(rules) if (row, rank) in found]
        if not at:
            continue
        scores = [[found[row, rank].test(seed) for seed in rules.seeds] for rank in at]
        style = figures.style(row)
        axes.plot(at, [interval(each).mean for each in scores], label=found[row, at[0]].label, **style)
        for rank, each in zip(at, scores, strict=True):
            axes.plot([rank] * len(each), each, ".", color=style["color"], alpha=0.35)
    axes.set(xscale="log", xlabel="rank r", ylabel="test accuracy at the chosen rate")
    axes.set_xticks(ranks(rules), [str(rank) for rank in ranks(rules)])
    axes.minorticks_off()
    axes.legend(frameon=False)
    return figures.finished(figure, rules)


CLAIM = Claim(
    "dora-rank",
    "DoRA at half of LoRA's rank and lower",
    "Liu et al., arXiv:2402.09353, sections 5.1 and 5.5, table 1, figure 5",
    45,
    runs,
    lines,
    draw,
    core=False,
)
