"""DeLoRA's bound: ‖ΔW‖_F ≤ λ max n at every step of every run of the sweep, whatever the rate."""

from matplotlib.figure import Figure

from benchmarks.claims import figures
from benchmarks.claims.claim import Claim, Line
from benchmarks.claims.record import Record
from benchmarks.claims.rules import CANNOT_TELL, DOES_NOT, HOLDS, Rules, rate
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.training import Run

METHODS = ("delora", "delora-paper")
FORMULAS = {"delora": "λ max n", "delora-paper": "(λ + λ₀) max n"}


def runs(record: Record, rules: Rules) -> list[Run]:
    """Return the sweeps of both DeLoRAs, which the claim on learning rates has too."""
    return [run for row in METHODS for run in Sweep(record, rules, row).runs]


def lines(record: Record, rules: Rules) -> list[Line]:
    """Say the most that any layer reached of its bound, at any step of any run."""
    made = []
    for row in METHODS:
        sweep = Sweep(record, rules, row)
        claimed = f"{sweep.label}: ‖ΔW‖_F ≤ {FORMULAS[row]} at every step, at every rate"
        parts = [record[run]["watched"]["bound"] for run in sweep.runs if run in record]
        if not sweep.complete:
            verdict = f"{CANNOT_TELL}: incomplete ({sweep.label})"
        else:
            verdict = HOLDS if max(parts) <= 1 else DOES_NOT
        ours = f"at most {max(parts):.3f} of it, in {len(parts)} runs" if parts else ""
        made.append(Line(claimed, "equation 7: by construction", ours, verdict))
    return made


def draw(record: Record, rules: Rules) -> Figure | None:
    """Draw the most of the bound that each run reached, against its rate."""
    sweeps = [sweep for row in METHODS if (sweep := Sweep(record, rules, row)).complete]
    if not sweeps:
        return None
    figure = figures.page(6.5, 3.8)
    axes = figure.subplots()
    for sweep in sweeps:
        most = [max(record[sweep.run(q, seed)]["watched"]["bound"] for seed in rules.seeds) for q in sweep.rates]
        axes.plot([rate(q) for q in sweep.rates], most, label=sweep.label, **figures.style(sweep.row))
    axes.axhline(1.0, color="0.5", linestyle=":")
    axes.set(xscale="log", xlabel="learning rate", ylabel="most of ‖ΔW‖_F / bound\nof any layer, step and seed")
    axes.set_ylim(0.0, 1.1)
    axes.legend(frameon=False)
    return figures.finished(figure, rules)


CLAIM = Claim(
    "delora-bound",
    "DeLoRA: the bound of its update",
    "Bini et al., arXiv:2503.18225, equations 6 and 7; docs/math.md",
    0,
    runs,
    lines,
    draw,
)
