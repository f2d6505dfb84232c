"""What a study costs: time of a step and what it keeps for backward, of every method, and of PEFT's
eager layers where it has the method.

Each pair of runs, fused and eager, follows one another on the same task, start and batches; time is
the processor's, of the median step. The model is far too small for kernels to matter: it shows what
the host pays.
"""

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line
from benchmarks.claims.delora_rate import METHODS
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import CANNOT_TELL, LEAST_COST, Rules, interval, more
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

PEFTS = ("lora", "rslora", "dora", "delora")
Q = -10


def run(record: Record, rules: Rules, row: str, seed: int, fused: bool = True) -> Run:
    """Return a run whose memory is weighed at its start."""
    sweep = Sweep(record, rules, row)
    return sweep.run(Q, seed, marks=(0, rules.steps), watch=("kept",), fused=fused)


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return every method's run of each seed, PEFT's eager ones beside theirs."""
    return [
        run(record, rules, row, seed, fused)
        for seed in rules.seeds
        for row in METHODS
        for fused in ((True, False) if row in PEFTS else (True,))
    ]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Say what a step of each method takes, fused and, of PEFT's methods, eager."""
    made = []
    for row in METHODS:
        label = ROWS[row].label
        claimed = f"{label}: a step takes less time fused than with PEFT's eager layers"
        if row not in PEFTS:
            claimed = f"{label}: what a step takes"
        fused = [run(record, rules, row, seed) for seed in rules.seeds]
        eager = [run(record, rules, row, seed, False) for seed in rules.seeds] if row in PEFTS else []
        if not all(one in record for one in (*fused, *eager)):
            made.append(Line(claimed, "", "", f"{CANNOT_TELL}: incomplete ({label})"))
            continue
        times = [[record[one]["step_cpu_ms"] for one in some] for some in (fused, eager)]
        said = f"{interval(times[0]).mean:.1f} ms, keeps {_kept(record, fused):.0f} KiB"
        if row not in PEFTS:
            made.append(Line(claimed, "", said, ""))
            continue
        saved = [(b - a) / b for a, b in zip(*times, strict=True)]
        said += f"; eager {interval(times[1]).mean:.1f} ms, {_kept(record, eager):.0f} KiB: {interval(saved)}"
        made.append(Line(claimed, "", said, more(saved, LEAST_COST)))
    return made


def _kept(record: Record, runs: list[Run]) -> float:
    return float(record[runs[0]]["watched"]["kept"][0])


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw a step's time of every method, a dot a seed; eager ones hollow."""
    done = [row for row in METHODS if all(run(record, rules, row, seed) in record for seed in rules.seeds)]
    if not done:
        return None
    figure = figures.page(7.0, 3.6)
    axes = figure.subplots()
    for place, row in enumerate(done):
        for fused, face in ((True, figures.style(row)["color"]), (False, "none")):
            there = [one for seed in rules.seeds if (one := run(record, rules, row, seed, fused)) in record]
            times = [record[one]["step_cpu_ms"] for one in there]
            colour = figures.style(row)["color"]
            axes.plot(times, [place] * len(times), "o", markerfacecolor=face, markeredgecolor=colour)
    axes.set_yticks(range(len(done)), [ROWS[row].label for row in done])
    axes.invert_yaxis()
    axes.set_xlim(left=0.0)
    axes.set_xlabel("ms of the processor a step, a dot a seed (hollow: PEFT's eager layers)")
    return figures.finished(figure, rules)


CLAIM = Claim("cost", "What a study costs", "no paper: this library's own", 4, runs, lines, draw, core=False)
