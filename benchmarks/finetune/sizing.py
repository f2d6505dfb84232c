"""How large a run is, so that its report comes in time: what a step costs on this machine is
measured first.

A step of n tokens takes `fixed + per_token · n` seconds, which two lengths tell. A run that does
not fit gets fewer tokens in a step before it gets fewer steps: a curve needs steps.
"""

import time
from dataclasses import dataclass, replace

import torch

from benchmarks.finetune.config import Config
from benchmarks.finetune.train import Run, loss_of

SHAPES = ((2, 256), (2, 128), (1, 128), (1, 64), (1, 32))
"""Sequences × tokens of a step, the first that leaves CURVE steps is taken."""

CURVE, LEAST_STEPS = 20, 10
MARGIN = 0.75
"""Part of the time that is planned for: steps differ, and the report takes seconds too."""

HELD_OUT, YARDSTICK = 0.2, 0.15
"""Parts of the plan that the held-out evaluations and the further eager runs may take."""

SHORT, LONG = 32, 128
"""Tokens of the measured steps."""


@dataclass(frozen=True)
class Cost:
    """Seconds of a step of one model: forward and backward."""

    fixed: float
    per_token: float

    def step(self, tokens: int) -> float:
        """Return the seconds of a step of so many tokens."""
        return self.fixed + self.per_token * tokens


def measure(run: Run, config: Config) -> Cost:
    """Time steps of two lengths that change nothing, the shorter one twice: the first warms up."""
    seconds = [_seconds(run, length, config) for length in (SHORT, SHORT, LONG)]
    per_token = max(seconds[2] - seconds[1], 0.1 * seconds[2]) / (LONG - SHORT)  # noise may turn their order
    return Cost(max(seconds[2] - LONG * per_token, 0.0), per_token)


def _seconds(run: Run, length: int, config: Config) -> float:
    rows = torch.arange(length).remainder(200).view(1, length).to(config.device)
    began = time.monotonic()
    loss = loss_of(run, rows, config)
    loss.backward()
    loss.item()
    run.optimizer.zero_grad(set_to_none=True)
    return time.monotonic() - began


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
        yardstick = int(min(config.yardstick, YARDSTICK * planned // step))
        left = planned - heldout * 4 * cost.step(seq_len) / 2 - (yardstick + 2) * step
        steps = _within(left, 2 * step, config.steps)
        if steps >= min(CURVE, config.steps):
            break
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


def _within(seconds: float, each: float, most: int) -> int:
    """Return how many that take `each` fit, from 1 to `most`."""
    return int(max(1, min(most, seconds // each)))
