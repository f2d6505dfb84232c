"""What part of one model's overhead over another is gone, and how sure the rounds make of it."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

RESAMPLES = 2000


def gone(spent: Mapping[str, Any], name: str, peft: str = "peft") -> Any:
    """Return the part of PEFT's overhead that `name` does not have."""
    return 1 - (spent[name] - spent["frozen"]) / (spent[peft] - spent["frozen"])


def interval(
    figure: Callable[[dict[str, Any]], Any], times: Mapping[str, Sequence[float]], seed: int = 0
) -> tuple[float, float, float]:
    """Return a figure of the medians, and the interval that holds 95 % of it over rounds drawn
    anew.

    Args:
        figure: Of name → milliseconds: a number, or an array of them.
        times: Name → milliseconds of every round; the rounds are drawn together.
        seed: Of the draws.
    """
    count = min(map(len, times.values()))
    chosen = np.random.default_rng(seed).integers(count, size=(RESAMPLES, count))
    with np.errstate(divide="ignore", invalid="ignore"):
        whole = figure({name: np.median(each) for name, each in times.items()})
        found = np.sort(figure({name: np.median(np.asarray(each)[chosen], axis=1) for name, each in times.items()}))
    return float(whole), float(found[int(0.025 * RESAMPLES)]), float(found[int(0.975 * RESAMPLES) - 1])
