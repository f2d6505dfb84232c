"""The verdict: are the accelerated losses as close to eager's as those of eager with its sums in another order?

Two numbers are compared, both of |loss − eager's loss|: the mean over all steps, and the largest mean of 20 steps in a
row, which finds curves that part only later. One reordered run is one sample of what rounding does, so the accelerated
run may be up to twice as far away; both limits were fixed before the first run.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

FACTOR = 2.0
WINDOW = 20


@dataclass(frozen=True)
class Apart:
    """How far one loss curve is from eager's: mean, largest mean of `WINDOW` steps in a row, largest of all steps."""

    mean: float
    worst_window: float
    largest: float


@dataclass(frozen=True)
class Verdict:
    """Both curves' distances from eager's over the same steps.

    Attributes:
        steps: how many steps that are.
        fused: the accelerated run's.
        reordered: the reordered eager run's.
    """

    steps: int
    fused: Apart
    reordered: Apart

    @property
    def passed(self) -> bool:
        """Whether the accelerated run is at most `FACTOR` times as far away; False where a loss is NaN."""
        return (
            self.fused.mean <= FACTOR * self.reordered.mean
            and self.fused.worst_window <= FACTOR * self.reordered.worst_window
        )

    def words(self) -> str:
        """One line for people."""
        fused, reordered = self.fused, self.reordered
        return (
            f"{'passed' if self.passed else 'FAILED'}   accelerated losses "
            f"{'stay within' if self.passed else 'leave'} {FACTOR:g} times the spread of two eager runs with different "
            f"reduction order: mean distance {fused.mean:.2g} against {reordered.mean:.2g}, worst {WINDOW} steps "
            f"{fused.worst_window:.2g} against {reordered.worst_window:.2g}, over {self.steps} steps"
        )


def judge(fused: Sequence[float], reordered: Sequence[float]) -> Verdict:
    """The verdict over the steps that both have, from |loss − eager's loss| of each."""
    steps = min(len(fused), len(reordered))
    return Verdict(steps, _apart(fused[:steps]), _apart(reordered[:steps]))


def _apart(differences: Sequence[float]) -> Apart:
    """Condense |loss − eager's loss| of each step; NaN in, NaN out."""
    values = np.asarray(differences, dtype=np.float64)
    window = min(WINDOW, len(values))
    means = np.convolve(values, np.full(window, 1.0 / window), mode="valid")
    return Apart(float(values.mean()), float(means.max()), float(values.max()))
