"""DeLoRA on text: its score beside LoRA's and DoRA's, each at its best rate, on an encoder that
learns to tell docstrings apart and on a language model that goes on training.
"""

from matplotlib.figure import Figure

from benchmarks.claims import delora_rate, figures
from benchmarks.claims.claim import Claim, Line
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import STUDY, TEXT, TOPICS, Rules, interval
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

TASKS = {"docstrings": TEXT, "help topics": TOPICS}


def own(task: str, rules: Rules) -> Rules:
    """Return a text task's rules in place of the study's; others, as a smoke run's, stay."""
    return TASKS[task] if rules == STUDY else rules


def sweeps_of(task: str, record: Record, rules: Rules) -> dict[str, Sweep]:
    """Return every method's sweep on one of the tasks."""
    return {row: Sweep(record, own(task, rules), row) for row in delora_rate.METHODS}


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return pilot and sweep of every method, on one task after the other."""
    return [run for task in TASKS for sweep in sweeps_of(task, record, rules).values() for run in sweep.runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Judge the best scores of both DeLoRAs on both tasks."""
    made = []
    for task in TASKS:
        sweeps = sweeps_of(task, record, rules)
        for ours in delora_rate.DELORA:
            for rival in delora_rate.UNBOUNDED:
                line = delora_rate.scores(sweeps[ours], sweeps[rival], own(task, rules))
                made.append(line._replace(claimed=f"{task}: {line.claimed}"))
    return made


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw the test score of every method at its chosen rate, a dot a seed, a panel a task."""
    found = {task: [sweep for sweep in sweeps_of(task, record, rules).values() if sweep.complete] for task in TASKS}
    found = {task: sweeps for task, sweeps in found.items() if sweeps}
    if not found:
        return None
    figure = figures.page(1.5 + 5.0 * len(found), 3.6)
    for axes, (task, sweeps) in zip(figure.subplots(1, len(found), squeeze=False)[0], found.items(), strict=True):
        for place, sweep in enumerate(sweeps):
            values = [sweep.test(seed) for seed in sweep.rules.seeds]
            axes.plot(values, [place] * len(values), "o", color=figures.style(sweep.row)["color"], alpha=0.5)
            axes.plot(interval(values).mean, place, "|", color="black", markersize=14)
        axes.set_yticks(range(len(sweeps)), [ROWS[sweep.row].label for sweep in sweeps])
        axes.invert_yaxis()
        what = {"docstrings": "test accuracy", "help topics": "next tokens that come out first"}[task]
        axes.set(xlabel=f"{what} at the chosen rate, a dot a seed", title=f"{task}, {sweeps[0].rules.steps} steps")
    return figures.finished(figure, rules)


CLAIM = Claim(
    "text-scores",
    "DeLoRA: its score on text",
    "Bini et al., arXiv:2503.18225, tables 4 and 5",
    300,
    runs,
    lines,
    draw,
    core=False,
)
