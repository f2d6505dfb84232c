"""The two plots: losses over the steps, and bars of time and memory."""

from statistics import fmean, median

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from benchmarks.finetune.summary import Result, number, spread_ms
from benchmarks.finetune.verdict import WINDOW

EAGER, FUSED, YARDSTICK = "#E69F00", "#0072B2", "#777777"  # Okabe and Ito's colours: told apart by everyone
SMOOTH = 8


def loss(result: Result) -> Figure:
    """Training loss of both runs over the steps, and below it how far they are apart."""
    figure = Figure(figsize=(7.0, 6.0), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    steps = range(1, result.steps + 1)
    for run, colour, width, size in ((result.eager, EAGER, 5.0, 11.0), (result.fused, FUSED, 1.8, 6.0)):
        values = result.losses(run)
        few = "o" if result.steps == 1 else ""  # one step alone is no line
        upper.plot(steps, values, marker=few, color=colour, linewidth=0.3 * width, alpha=0.35)
        upper.plot(steps, running_mean(values, SMOOTH), color=colour, linewidth=width, label=run.name)
        held_out = dict(zip((0, result.steps), run.heldout, strict=False))
        upper.plot(*zip(*held_out.items(), strict=True), "D", color=colour, markersize=size, markeredgecolor="white")
    upper.plot([], [], "D", color="0.4", markeredgecolor="white", label="held-out text")
    upper.set_ylabel("loss (nats per token)")
    _differences(lower, result)
    lower.set_ylim(bottom=0.0)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.set_xlabel(f"step\nlosses: faint each step, bold the mean of {SMOOTH}", linespacing=1.5)
    for axes in (upper, lower):
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=3, borderaxespad=0.2)
        _plain(axes)
    figure.suptitle(_title(result), x=0.02, ha="left")
    return figure


def _differences(axes: Axes, result: Result) -> None:
    """How far the accelerated run and the yardsticks are from eager; bold: means like the
    verdict's.
    """
    long = result.verdict() is not None and result.steps > WINDOW
    yardsticks = result.nudged_or_reordered
    for run, colour, style in (*((run, YARDSTICK, "--") for run in yardsticks), (result.fused, FUSED, "-")):
        label = run.name if run is result.fused or run is yardsticks[0] else None  # one line of the legend for all
        apart = result.differences(run)
        steps = range(1, len(apart) + 1)
        if long:
            axes.plot(steps, apart, color=colour, linewidth=0.5, alpha=0.5)
            axes.plot(steps[WINDOW - 1 :], running_mean(apart, WINDOW)[WINDOW - 1 :], color=colour, label=label)
        else:
            axes.plot(steps, apart, color=colour, linestyle=style, label=label)
    axes.set_ylabel("|loss − eager's loss|" + f"\nbold: mean of {WINDOW}" * long, linespacing=1.5)


def running_mean(values: list[float], window: int) -> list[float]:
    """Mean of each value and up to `window - 1` before it."""
    return [fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)]


def _title(result: Result) -> str:
    """Name method, model and device."""
    device = result.machine["device"] if result.machine["device"] != "cpu" else result.machine["cpu"]
    return f"{result.config.method} r={result.config.rank}, {result.model}, {device}"


def bars(result: Result) -> Figure:
    """Draw memory, and median step times with their p20 to p80 range where the table trusts them,
    side by side.
    """
    memory = {"kept for backward (MiB)": [run.kept_mib or 0.0 for run in (result.eager, result.fused)]}
    if result.eager.peak_mib and result.fused.peak_mib:
        memory["peak of a step above resident (MiB)"] = [median(run.peak_mib) for run in (result.eager, result.fused)]
    timed = result.trusted
    names = (result.eager.name, result.fused.name)
    figure = Figure(figsize=(3.2 * (timed + len(memory)), 3.6), layout="constrained")
    panels = figure.subplots(1, timed + len(memory), squeeze=False)[0]
    if timed:
        times = [spread_ms(result.step_ms(run)) for run in (result.eager, result.fused)]
        low_high = [[p50 - p20 for p20, p50, _ in times], [p80 - p50 for _, p50, p80 in times]]
        _two_bars(panels[0], names, "step (ms): median, p20 to p80", [p50 for _, p50, _ in times], low_high)
    for axes, (title, values) in zip(panels[timed:], memory.items(), strict=True):
        _two_bars(axes, names, title, values)
    figure.suptitle(_title(result), x=0.02, ha="left")
    return figure


def _two_bars(
    axes: Axes, names: tuple[str, str], title: str, values: list[float], errors: list[list[float]] | None = None
) -> None:
    """One panel: eager beside accelerated, each with its value inside the bar's foot."""
    drawn = axes.bar(names, values, color=(EAGER, FUSED), width=0.6, yerr=errors, ecolor="0.25", capsize=5)
    for bar, value, ink in zip(drawn, values, ("black", "white"), strict=True):
        middle = bar.get_x() + bar.get_width() / 2
        axes.text(middle, 0.04 * max(values), number(value), ha="center", color=ink, weight="bold")
    axes.set_title(title, fontsize=10)
    _plain(axes)


def _plain(axes: Axes) -> None:
    """Fewer lines around the data."""
    axes.spines[["top", "right"]].set_visible(False)
