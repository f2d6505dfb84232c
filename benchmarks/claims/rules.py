"""What was fixed before the first run: budgets, seeds, learning rates, how a verdict is reached.

Every method gets the same number of runs. A learning rate is a whole number q of quarter decades,
lr = 10^(q/4).

1. Pilot: every method at `pilot_rates`, four decades, on `pilot_seeds`, which the study does not
   use. The rate with the best mean validation score is the method's centre.
2. Sweep: the centre plus each of `offsets` (nine rates over two decades, and four more out to four
   decades), on `seeds`. The rate with the best mean validation score is the chosen one; what is
   reported is measured on test data.
3. Where the pilot's or the sweep's best rate is the first or the last of its range, every verdict
   that stands on that method is "can't tell": its best may lie outside.
4. Where 4x the chosen rate lies outside the sweep, the verdict on the drop there is "can't tell".
   (Added after the first runs: until then the last rate of the sweep, as little as 3.16x, stood in
   for it, unsaid.)
5. On help topics, whose runs cost minutes each, the pilot's best rate is the chosen one. (Added
   with that task, before its first run. Nothing else has changed.)

A verdict takes one number of each seed, the difference of two methods on that seed's data, and the
95 % interval of the mean by Student's t:

* "more" claims (A exceeds B) hold if the whole interval is above 0 and the mean is at least the
  least difference that counts; they do not hold if the whole interval is below that least
  difference; else one can't tell.
* "no less" claims (A matches B or exceeds it) hold if the whole interval is above minus the margin;
  they do not hold if the whole interval is below minus the margin; else one can't tell.

The task's sizes (steps, shift, width) were chosen by looking at one split, of seed 0, with full
fine-tuning, LoRA, DeLoRA, GOAT and ETHER+ at three or four rates; seed 0 is in neither list.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean, stdev

HOLDS, DOES_NOT, CANNOT_TELL = "holds", "does not hold", "can't tell"

NEAR_BEST = 0.05
"""A rate is near a method's best where the score is at least (1 - this) times the best one."""

LEAST_DECADES = 0.25
"""Least difference of two widths that counts, in decades of the learning rate: one step of the
sweep.
"""

LEAST_SCORE = 0.02
"""Least difference of two accuracies that counts, and the margin within which they match."""

LEAST_DROP = 0.05
"""Least difference of two relative drops of a score that counts."""

LEAST_DOUBLINGS = 0.5
"""Least difference of two growths of ‖ΔW‖_F / ‖W‖_F that counts, in factors of two."""

LEAST_FACTOR = 1.5
"""Least ratio of two layers' mean column norms that counts as a difference."""

LEAST_COST = 0.05
"""Least share of a step's time that counts."""

ABOVE = 4.0
"""How far above the chosen rate the drop is taken: the paper sees LoRA and DoRA degrade at 4x."""

LEAST_CORRELATION = 0.2
"""Least correlation, and least difference of two, that counts."""

ROUNDING = 1e-5
"""What ‖ΔW‖ may be off by, as a part of ‖W‖: it is the layer's float32 output on an identity matrix
less the frozen layer's, each of which is rounded to 6e-8 of W and the bias some three times.
"""

# 97.5 % quantiles of Student's t by degrees of freedom.
_T = {1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


@dataclass(frozen=True)
class Rules:
    """Budgets, seeds and rates of a study.

    Attributes:
        task: the task's name, with the version of its data and sizes.
        seeds, pilot_seeds: each draws its own pretrained model, split, start and order of batches.
        steps: optimiser steps of a run; the rate rises over `warmup` of them, then stays.
        long: the long run's steps, as a multiple.
        pilot_rates: q of the pilot's rates.
        offsets: q of the sweep's rates, from the method's centre.
        rank: r of every low-rank method, of all experts together.
    """

    task: str = "digits-1"
    seeds: tuple[int, ...] = (1, 2, 3, 4, 5)
    pilot_seeds: tuple[int, ...] = (101, 102)
    steps: int = 150
    warmup: int = 10
    long: int = 10
    pilot_rates: tuple[int, ...] = (-16, -14, -12, -10, -8, -6, -4, -2, 0)
    offsets: tuple[int, ...] = (-8, -6, -4, -3, -2, -1, 0, 1, 2, 3, 4, 6, 8)
    rank: int = 8


STUDY = Rules()
TEXT = Rules("docstrings-1", (1, 2, 3), (101,), 40, 4, 1, (-16, -13, -10, -7, -4), (-2, 0, 2))
"""Of the claims on text, whose runs cost a minute each: three rates, of which the middle one alone
is no edge.
"""
TOPICS = Rules("topics-1", (1, 2, 3), (101,), 30, 3, 1, (-20, -17, -14, -11, -8, -5, -2), (0,))
"""Of the claims on a language model."""

SMOKE = Rules("drawn-1", (1, 2), (101,), 3, 2, 2, (-10, -8, -6), (-2, 0, 2), 4)
"""The same machinery in seconds, on data that are drawn: for tests, its verdicts mean nothing."""


def rate(q: int) -> float:
    """Return the learning rate of q quarter decades."""
    return float(10.0 ** (q / 4))


@dataclass(frozen=True)
class Interval:
    """A mean over seeds and its 95 % interval."""

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}]"


def interval(values: Sequence[float]) -> Interval:
    """Return the mean of one value a seed, and its interval; without limits for fewer than two."""
    mean = fmean(values)
    if len(values) < 2:
        return Interval(mean, -math.inf, math.inf)
    half = _T[len(values) - 1] * stdev(values) / math.sqrt(len(values))
    return Interval(mean, mean - half, mean + half)


def more(differences: Sequence[float], least: float) -> str:
    """Judge "A exceeds B" by A - B of each seed."""
    found = interval(differences)
    if found.low > 0 and found.mean >= least:
        return HOLDS
    return DOES_NOT if found.high < least else CANNOT_TELL


def no_less(differences: Sequence[float], margin: float) -> str:
    """Judge "A matches B or exceeds it" by A - B of each seed."""
    found = interval(differences)
    if found.low > -margin:
        return HOLDS
    return DOES_NOT if found.high < -margin else CANNOT_TELL


def censored(verdict: str, a_open: bool, b_open: bool) -> str:
    """Return what is left of a verdict on the difference of two widths where some may be wider than
    measured.

    Args:
        verdict: by the widths as measured.
        a_open, b_open: whether some seed's width of A, or of B, reaches an end of the sweep. An
            open A may be wider still, so that "does not hold" is not known; an open B likewise,
            so that "holds" is not.
    """
    if (verdict == DOES_NOT and a_open) or (verdict == HOLDS and b_open):
        return CANNOT_TELL
    return verdict
