"""One method's pilot and sweep in a record: which runs are missing, the chosen rate, the width of
the range that is near it.
"""

import math
from functools import cached_property
from statistics import fmean
from typing import Any

from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS
from benchmarks.claims.rules import NEAR_BEST, Rules
from benchmarks.claims.training import Run


class Sweep:
    """A method's sweep.

    Args:
        record: what has been found so far; the sweep sees it as it is when first asked.
        rules: the study's.
        row: a name of `ROWS`.
        rank: r; None: the study's.
    """

    def __init__(self, record: Record, rules: Rules, row: str, rank: int | None = None) -> None:
        self.record, self.rules, self.row, self.rank = record, rules, row, rank or rules.rank
        self.label = ROWS[row].label

    def run(self, q: int, seed: int, **settings: Any) -> Run:
        """Return the method's run at one rate; `settings` say what is not the study's."""
        rules, steps = self.rules, settings.get("steps", self.rules.steps)
        usual = {"steps": steps, "marks": (steps,), "watch": ROWS[self.row].watch, "warmup": rules.warmup}
        return Run(rules.task, self.row, self.rank, q, seed, **(usual | settings))

    @cached_property
    def pilot(self) -> list[Run]:
        """The pilot's runs."""
        return [self.run(q, seed) for q in self.rules.pilot_rates for seed in self.rules.pilot_seeds]

    @cached_property
    def centre(self) -> int | None:
        """q of the pilot's best rate; None while it is incomplete."""
        if not all(run in self.record for run in self.pilot):
            return None
        return self._best(self.rules.pilot_rates, self.rules.pilot_seeds)

    @cached_property
    def rates(self) -> list[int]:
        """q of the sweep's rates."""
        assert self.centre is not None
        return [self.centre + offset for offset in self.rules.offsets]

    @cached_property
    def runs(self) -> list[Run]:
        """All runs that are known to be wanted: the pilot's, then also the sweep's."""
        if self.centre is None:
            return self.pilot
        return self.pilot + [self.run(q, seed) for seed in self.rules.seeds for q in self.rates]

    @cached_property
    def complete(self) -> bool:
        """Whether all runs are in the record."""
        return self.centre is not None and all(run in self.record for run in self.runs)

    @cached_property
    def chosen(self) -> int:
        """q of the rate with the best validation score, of a complete sweep."""
        return self._best(self.rates, self.rules.seeds)

    @cached_property
    def at_edge(self) -> bool:
        """Whether the pilot's or the sweep's best is the first or the last of its rates; a sweep of
        one rate has no edge.
        """
        pilots, rates = self.rules.pilot_rates, self.rates
        return self.centre in (pilots[0], pilots[-1]) or (len(rates) > 1 and self.chosen in (rates[0], rates[-1]))

    def _best(self, rates: Any, seeds: Any) -> int:
        """Return the lowest of the rates that score best: ties are decided before they are seen."""
        means = {q: fmean(self.record[self.run(q, seed)]["validation"][-1] for seed in seeds) for q in rates}
        return min(q for q in rates if means[q] == max(means.values()))

    def test(self, seed: int, q: int | None = None) -> float:
        """Return one seed's test score at a rate; None: at the chosen one."""
        return float(self.record[self.run(self.chosen if q is None else q, seed)]["test"][-1])

    def reaches(self, factor: float) -> bool:
        """Whether `factor` times the chosen rate lies within the sweep."""
        return self.rates[0] <= self.chosen + 4 * math.log10(factor) <= self.rates[-1]

    def at(self, seed: int, factor: float) -> float:
        """Return one seed's test score at `factor` times the chosen rate, which the sweep
        `reaches`, between two of its rates by a straight line over log rate.
        """
        wanted = self.chosen + 4 * math.log10(factor)
        if not self.reaches(factor):
            raise ValueError(f"Sweep.at: factor must lead to a rate of the sweep, got {factor:g}: ask reaches first")
        below = max(q for q in self.rates if q <= wanted)
        above = min(q for q in self.rates if q >= wanted)
        share = 0.0 if below == above else (wanted - below) / (above - below)
        return (1 - share) * self.test(seed, below) + share * self.test(seed, above)

    def width(self, seed: int) -> tuple[float, bool]:
        """Measure the range of rates around the chosen one whose test score is within `NEAR_BEST`
        of its score.

        Returns:
            Decades, ends found by straight lines over log rate; whether it reaches an end of the
            sweep, so that it may be wider.
        """
        scores = [self.test(seed, q) for q in self.rates]
        middle = self.rates.index(self.chosen)
        least = (1 - NEAR_BEST) * scores[middle]
        ends, reached = [], False
        for step in (-1, 1):
            at = middle
            while 0 <= at + step < len(scores) and scores[at + step] >= least:
                at += step
            end = float(self.rates[at])
            if 0 <= at + step < len(scores):
                inside, outside = scores[at], scores[at + step]
                end += (self.rates[at + step] - end) * (inside - least) / (inside - outside)
            else:
                reached = True
            ends.append(end)
        return (ends[1] - ends[0]) / 4, reached
