"""What the figures of all claims share: colours, marks, the line that says what was run."""

from typing import Any

from matplotlib.figure import Figure

from benchmarks.claims.rules import Rules

# Okabe and Ito's colours, told apart by everyone; a second method of a colour is dashed.
_STYLES: dict[str, tuple[str, str]] = {
    "full": ("black", "-"),
    "lora": ("#E69F00", "-"),
    "rslora": ("#E69F00", "--"),
    "dora": ("#D55E00", "-"),
    "delora": ("#0072B2", "-"),
    "delora-paper": ("#0072B2", "--"),
    "ether": ("#009E73", "--"),
    "ether+": ("#009E73", "-"),
    "goat": ("#CC79A7", "-"),
    "mixture": ("#CC79A7", "--"),
    "mixture-theory": ("#CC79A7", ":"),
    "goat-alpha": ("#CC79A7", "-."),
    "normalised": ("#56B4E9", "-"),
    "ether+output": ("#009E73", "-"),
    "scaled": ("#009E73", "--"),
    "ranked": ("#999999", "-"),
    "relaxed": ("#999999", "--"),
}


def style(row: str) -> dict[str, Any]:
    """Return colour, line and marker of a method's curve."""
    colour, line = _STYLES[row]
    return {"color": colour, "linestyle": line, "marker": "o", "markersize": 3, "linewidth": 1.4}


def page(width: float, height: float) -> Figure:
    """Return an empty figure, in inches."""
    return Figure(figsize=(width, height), layout="constrained")


def finished(figure: Figure, rules: Rules) -> Figure:
    """Take away the needless lines, say what was run."""
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
    said = f"{rules.task}: {len(rules.seeds)} seeds, {rules.steps} steps, r = {rules.rank}"
    figure.suptitle(said, x=0.01, ha="left", fontsize=8, color="0.4")
    return figure
