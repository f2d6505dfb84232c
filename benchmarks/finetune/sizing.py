"""How large a run is, so that its report comes in time: what a step costs on this machine is
measured first.

A step of n tokens takes `fixed + per_token · n` seconds, which two lengths tell. What does not fit
gets fewer tokens in a step before it gets fewer steps or rounds: curves and intervals need them.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from benchmarks.finetune.config import Config
from benchmarks.finetune.train import SHORTEST, Run, loss_of

SHAPES = ((2, 256), (2, 128), (1, 128), (1, 64), (1, 32), (1, SHORTEST))
"""Sequences × tokens of a step; of the curve, the first that leaves CURVE steps is taken."""

CURVE, LEAST_STEPS = 20, 10
MARGIN = 0.75
"""Part of the time that is planned for: steps differ, and a neighbour may come."""

IN_TIME, REPORT = 0.96, 0.2
"""Part of the minutes after which all is measured; what writing the report takes, of the time that
importing the packages took."""

TABLE, LEAST_TABLE = 0.4, 0.15
"""Part of the time for the first table, and where the curve needs the rest."""
TABLE_SECONDS = 60.0
"""For the table where nothing is to be sized."""
ROUNDS, STEPS_A_ROUND = 10, 12.0
"""Rounds that the table is to have, and what one takes in steps of the frozen model, about."""
ENOUGH_ROUNDS = 5
"""Fewer say nothing about speed."""
LEAST_BLOCKS, TOKENS = 2, 128
"""Below so many tokens the table times a part of the model's blocks, not fewer tokens."""

HELD_OUT, YARDSTICK = 0.2, 0.15
"""Parts of the plan that the held-out evaluations and the further eager runs may take."""

SHORT, LONG = 16, 64
"""Tokens of the measured steps."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step of one model: forward and backward."""

    fixed: float
    per_token: float

    def step(self, tokens: int) -> float:
        """Return the seconds of a step of so many tokens."""
        return self.fixed + self.per_token * tokens

    def times(self, factor: float) -> "Cost":
        """Return the cost of a model whose steps take so many times as long."""
        return Cost(factor * self.fixed, factor * self.per_token)


def end_of(minutes: float, began: float, imported: float) -> float:
    """Return the value of `time.monotonic()` by which all is to be measured.

    Args:
        minutes: For the whole command.
        began, imported: The values when it began, and when the packages were imported.
    """
    return began + IN_TIME * 60.0 * minutes - REPORT * (imported - began)


def measure(timed: Callable[[int], float], config: Config) -> Cost:
    """Time steps of two lengths; let torch use one CPU thread where that is faster than all.

    Where other processes hold the cores, threads that wait for each other at each small operation
    may make a step ten times as long.

    Args:
        timed: takes a step of so many tokens that changes nothing, and returns its seconds.
        config: device, and the threads that the user wants.
    """
    choices = {torch.get_num_threads()}
    if config.threads is None and config.device.startswith("cpu"):
        choices = {1, config.most_threads}
    seconds: dict[tuple[int, int], float] = {}
    timed(SHORT)  # warms up
    for length in (SHORT, LONG):
        for threads in sorted(choices):
            torch.set_num_threads(threads)
            seconds[length, threads] = timed(length)
        if seconds[length, max(choices)] > 2 * seconds[length, min(choices)]:
            choices = {min(choices)}
    best = min(choices, key=lambda threads: seconds[LONG, threads])
    torch.set_num_threads(best)
    short, long = seconds[SHORT, best], seconds[LONG, best]
    per_token = max((long - short) / (LONG - SHORT), 0.25 * long / LONG)  # noise may turn their order
    return Cost(max(long - LONG * per_token, 0.0), per_token)


def rows_of_ids(batch_size: int, seq_len: int, config: Config) -> torch.Tensor:
    """Return token ids that any model has, to time steps with: int64 `[batch_size, seq_len]`."""
    return torch.arange(batch_size * seq_len).remainder(200).view(batch_size, seq_len).to(config.device)


def timer(run: Run, config: Config) -> Callable[[int], float]:
    """Return what takes a step of a run without its update, for `measure`."""

    def timed(length: int) -> float:
        rows = rows_of_ids(1, length, config)
        began = time.monotonic()
        loss = loss_of(run, rows, config)
        loss.backward()
        loss.item()
        run.optimizer.zero_grad(set_to_none=True)
        return time.monotonic() - began

    return timed


def table_seconds(config: Config, cost: Cost, left: float) -> float:
    """Return how long the table may take: what leaves time for the least curve.

    Args:
        config: Whether there is a limit.
        cost: Of the frozen model; an adapted one's step takes half as long again, about.
        left: Seconds to the report.
    """
    if not config.sized:
        return TABLE_SECONDS
    curve = (2 * LEAST_STEPS + 8) * 1.5 * cost.step(SHORTEST)  # and 8 to measure, probe and evaluate
    return max(min(TABLE * left, left - curve), LEAST_TABLE * left, 0.0)


def blocks_of(cost: Cost, blocks: int, seconds: float) -> int:
    """Return how many of the model's blocks the table times: all, if ROUNDS of TOKENS fit."""
    needed = ROUNDS * STEPS_A_ROUND * cost.step(TOKENS)
    return max(min(LEAST_BLOCKS, blocks), min(blocks, int(blocks * seconds / needed)))


def table(config: Config, cost: Cost, short: float, seconds: float) -> tuple[int, int, float]:
    """Return sequences and tokens of the table's steps, the most with which ROUNDS fit, and a
    round's seconds.

    Args:
        config: The most of both.
        cost: Of the frozen model: how time grows with tokens.
        short: Seconds of a round of SHORT tokens.
        seconds: For all rounds.
    """
    shapes = [(config.batch_size, config.seq_len)]
    shapes += [each for each in SHAPES if each[0] <= config.batch_size and each[1] < config.seq_len]
    for batch_size, seq_len in shapes:
        one = short * cost.step(batch_size * seq_len) / cost.step(SHORT)
        if (ROUNDS + 1) * one <= seconds:
            break
    return batch_size, seq_len, one


def fitted(config: Config, cost: Cost, seconds: float) -> Config:
    """Return the settings with the steps, tokens and evaluations that fit into `seconds`.

    Two models take each step, are probed once (a step) and evaluated twice (a forward pass, half a
    step at most).

    Args:
        config: What is wanted where there is time for it.
        cost: Of one model's step.
        seconds: From now to the report.
    """
    planned = MARGIN * seconds
    for batch_size, seq_len in SHAPES:
        step = cost.step(batch_size * seq_len)
        heldout = _within(HELD_OUT * planned, 4 * cost.step(seq_len) / 2, config.heldout_blocks)
        yardstick = int(max(0, min(config.yardstick, YARDSTICK * planned // step)))
        left = planned - heldout * 4 * cost.step(seq_len) / 2 - (yardstick + 2) * step
        steps = _within(left, 2 * step, config.steps)
        if steps >= min(CURVE, config.steps):
            break
    if steps < min(CURVE, config.steps):
        yardstick = 0
    steps = max(steps, min(LEAST_STEPS, config.steps))
    return replace(
        config,
        batch_size=batch_size,
        seq_len=seq_len,
        steps=steps,
        warmup=min(config.warmup, steps // 4),
        heldout_blocks=heldout,
        yardstick=min(yardstick, steps),
    )


def heldout_within(forward: float, seconds: float, most: int) -> int:
    """Return how many held-out batches fit, once a forward pass has been timed: two models,
    twice.
    """
    return _within(HELD_OUT * MARGIN * seconds, 4 * forward, most)


def least_rounds(one: float, table: float, report: float) -> int:
    """Return how many rounds the table takes whatever the time: enough for an interval, unless the
    curve would suffer.

    Args:
        one: Seconds of a round.
        table, report: Seconds left for the table, and until the report.
    """
    if ENOUGH_ROUNDS * one <= max(table, LEAST_TABLE * report):
        return ENOUGH_ROUNDS
    return max(1, int(LEAST_TABLE * report // one))


def _within(seconds: float, each: float, most: int) -> int:
    """Return how many that take `each` fit, from 1 to `most`."""
    return int(max(1, min(most, seconds // each)))
