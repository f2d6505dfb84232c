"""The two plots: losses over the steps, and bars of time and memory."""

from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.finetune.summary import Result, number, spread_ms

EAGER, FUSED, NUDGED = "#E69F00", "#0072B2", "#777777"  # Okabe and Ito's colours: told apart by everyone
WINDOW = 8


def loss(result: Result) -> Figure:
    """Training loss of both runs over the steps, and below it how far they are apart."""
    figure = Figure(figsize=(7.0, 5.4), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, result.steps + 1)
    for run, colour, width, size in ((result.eager, EAGER, 5.0, 11.0), (result.fused, FUSED, 1.8, 6.0)):
        values = result.losses(run)
        upper.plot(steps, values, color=colour, linewidth=0.3 * width, alpha=0.35)
        upper.plot(steps, running_mean(values, WINDOW), color=colour, linewidth=width, label=run.name)
        held_out = dict(zip((0, result.steps), run.heldout, strict=False))
        upper.plot(*zip(*held_out.items(), strict=True), "D", color=colour, markersize=size, markeredgecolor="white")
    upper.plot([], [], "D", color="0.4", markeredgecolor="white", label="held-out text")
    upper.set_ylabel(f"loss (nats per token)\nfaint: each step; bold: mean of {WINDOW}", linespacing=1.5)
    lower.plot(steps, result.differences(result.fused), color=FUSED, label="accelerated")
    if result.nudged is not None and result.nudged.losses:
        drift = result.differences(result.nudged)
        lower.plot(range(1, len(drift) + 1), drift, color=NUDGED, linestyle="--", label="eager, nudged at the start")
    lower.set_ylim(bottom=0.0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_ylabel("|loss − eager's loss|")
    lower.set_xlabel("step")
    for axes in (upper, lower):
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
        _plain(axes)
    figure.suptitle(_title(result), x=0.02, ha="left")
    return figure


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _title(result: Result) -> str:
    """Method, model and device."""
    device = result.machine["device"] if result.machine["device"] != "cpu" else result.machine["cpu"]
    return f"{result.config.method} r={result.config.rank}, {result.model}, {device}"


def bars(result: Result) -> Figure:
    """Median step time with its p20 to p80 range, and memory, of both runs side by side."""
    memory = {"kept for backward (MiB)": [run.kept_mib or 0.0 for run in (result.eager, result.fused)]}
    if result.eager.peak_mib and result.fused.peak_mib:
        memory["peak of a step above resident (MiB)"] = [median(run.peak_mib) for run in (result.eager, result.fused)]
    figure = Figure(figsize=(3.2 * (1 + len(memory)), 3.6), layout="constrained")
    panels = figure.subplots(1, 1 + len(memory), squeeze=False)[0]
    times = [spread_ms(result.step_ms(run)) for run in (result.eager, result.fused)]
    low_high = [[p50 - p20 for p20, p50, _ in times], [p80 - p50 for _, p50, p80 in times]]
    _two_bars(panels[0], "step (ms): median, p20 to p80", [p50 for _, p50, _ in times], low_high)
    for axes, (title, values) in zip(panels[1:], memory.items(), strict=True):
        _two_bars(axes, title, values)
    figure.suptitle(_title(result), x=0.02, ha="left")
    return figure


def _two_bars(axes: Axes, title: str, values: list[float], errors: list[list[float]] | None = None) -> None:
    """One panel: eager beside accelerated, each with its value inside the bar's foot."""
    drawn = axes.bar(
        ("PEFT eager", "accelerated"), values, color=(EAGER, FUSED), width=0.6, yerr=errors, ecolor="0.25", capsize=5
    )
    for bar, value, ink in zip(drawn, values, ("black", "white"), strict=True):
        middle = bar.get_x() + bar.get_width() / 2
        axes.text(middle, 0.04 * max(values), number(value), ha="center", color=ink, weight="bold")
    axes.set_title(title, fontsize=10)
    _plain(axes)


def _plain(axes: Axes) -> None:
    """Fewer lines around the data."""
    axes.spines[["top", "right"]].set_visible(False)
