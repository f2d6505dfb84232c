"""DeLoRA on text: its score beside LoRA's and DoRA's on a pretrained encoder, each at its best of
three rates around a pilot's best, three seeds.
"""

from matplotlib.figure import Figure

from benchmarks.claims import delora_rate, figures
from benchmarks.claims.claim import Claim, Line
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import STUDY, TEXT, Rules, interval
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run


def own(rules: Rules) -> Rules:
    """Return the rules of the text task in place of the study's; others, as a smoke run's, stay."""
    return TEXT if rules == STUDY else rules


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return pilot and sweep of every method."""
    return [run for row in delora_rate.METHODS for run in Sweep(record, own(rules), row).runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the best scores of both DeLoRAs."""
    sweeps = {row: Sweep(record, own(rules), row) for row in delora_rate.METHODS}
    return [
        delora_rate.scores(sweeps[ours], sweeps[rival], own(rules))
        for ours in delora_rate.DELORA
        for rival in delora_rate.UNBOUNDED
    ]


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw the test score of every method at its chosen rate, a dot a seed."""
    sweeps = [sweep for row in delora_rate.METHODS if (sweep := Sweep(record, own(rules), row)).complete]
    if not sweeps:
        return None
    figure = figures.page(6.5, 3.6)
    axes = figure.subplots()
    for place, sweep in enumerate(sweeps):
        values = [sweep.test(seed) for seed in sweep.rules.seeds]
        axes.plot(values, [place] * len(values), "o", color=figures.style(sweep.row)["color"], alpha=0.5)
        axes.plot(interval(values).mean, place, "|", color="black", markersize=14)
    axes.set_yticks(range(len(sweeps)), [ROWS[sweep.row].label for sweep in sweeps])
    axes.invert_yaxis()
    axes.set_xlabel("test accuracy at the chosen rate, a dot a seed")
    return figures.finished(figure, own(rules))


CLAIM = Claim(
    "text-scores",
    "DeLoRA: its score on text",
    "Bini et al., arXiv:2503.18225, tables 4 and 5",
    150,
    runs,
    lines,
    draw,
    core=False,
)
