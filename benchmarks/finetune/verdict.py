"""The verdict: are the accelerated losses as close to eager's as eager runs that sum in other
orders are to each other?

The distance of two runs is |loss − loss| of each step, condensed to its mean over all steps and to
the largest mean of 20 steps in a row, which finds curves that part only later. In both, the
accelerated run must be no further from the eager runs, on average over them, than the two eager
runs that are furthest apart: were it one more eager run in another order, it would be so too.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np

WINDOW = 20


@dataclass(frozen=True)
class Apart:
    """How far two loss curves are apart: mean, largest mean of `WINDOW` steps in a row, largest of
    all steps.
    """

    mean: float
    worst_window: float
    largest: float


@dataclass(frozen=True)
class Verdict:
    """The distances of the accelerated run and of the eager runs, over the steps that all have.

    Attributes:
        steps: how many steps that are.
        fused: from the accelerated run to the eager runs, the mean over them.
        spread: between the two eager runs that are furthest apart, in each number by itself.
        eager_runs: how many eager runs there are, each with its own order of sums.
    """

    steps: int
    fused: Apart
    spread: Apart
    eager_runs: int

    @property
    def passed(self) -> bool:
        """Whether the accelerated run is within the spread; False where a loss is NaN."""
        return self.fused.mean <= self.spread.mean and self.fused.worst_window <= self.spread.worst_window

    def words(self) -> str:
        """One line for people."""
        fused, spread = self.fused, self.spread
        return (
            f"{'passed' if self.passed else 'FAILED'}   accelerated losses {'stay within' if self.passed else 'leave'} "
            f"the spread of {self.eager_runs} eager runs with different reduction order: mean distance "
            f"{fused.mean:.2g} against {spread.mean:.2g}, worst {WINDOW} steps {fused.worst_window:.2g} against "
            f"{spread.worst_window:.2g}, over {self.steps} steps"
        )


def judge(fused: Sequence[float], eager: Sequence[Sequence[float]]) -> Verdict:
    """Return the verdict over the steps that all runs have.

    Args:
        fused: losses of the accelerated run.
        eager: losses of two eager runs or more, alike but for the order of their sums.
    """
    steps = min(map(len, (fused, *eager)))
    to_eager = np.array([_apart(fused, run, steps) for run in eager])
    between = np.array([_apart(one, other, steps) for one, other in combinations(eager, 2)])
    return Verdict(steps, Apart(*to_eager.mean(axis=0).tolist()), Apart(*between.max(axis=0).tolist()), len(eager))


def _apart(one: Sequence[float], other: Sequence[float], steps: int) -> tuple[float, float, float]:
    """Condense |one − other| of the first `steps` steps; NaN in, NaN out."""
    values = np.abs(np.asarray(one[:steps], dtype=np.float64) - np.asarray(other[:steps], dtype=np.float64))
    window = min(WINDOW, len(values))
    means = np.convolve(values, np.full(window, 1.0 / window), mode="valid")
    return float(values.mean()), float(means.max()), float(values.max())
