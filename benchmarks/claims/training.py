"""One run: a method at one rate on one seed's task, trained, looked at on the way, scored."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.claims import docstrings, help_topics
from benchmarks.claims.digits import digits, smoke
from benchmarks.claims.rows import adapted
from benchmarks.claims.rules import rate
from benchmarks.claims.task import Task
from benchmarks.claims.watches import WATCHES, Seen

TASKS: dict[str, Callable[[int], Task]] = {
    "digits-1": digits,
    "docstrings-1": docstrings.task,
    "topics-1": help_topics.task,
    "drawn-1": smoke,
}
LAST = 20
BEYOND = 1e9
"""What infinity is written as: JSON has none."""


@dataclass(frozen=True)
class Run:
    """All that a run depends on, and so its key in a record.

    Attributes:
        task: a name of `TASKS`; a change of its data or sizes gets a new name.
        row: a name of `ROWS`; a change of what it does gets a new name.
        rank: r.
        q: the learning rate, 10^(q/4).
        seed: draws data, pretrained model, start and batches.
        steps: optimiser steps; the rate rises over the first `warmup`.
        marks: steps after which it is scored and watched; the last is `steps`.
        watch: names of `WATCHES`.
        fused: False: PEFT's eager layers.
    """

    task: str
    row: str
    rank: int
    q: int
    seed: int
    steps: int
    warmup: int
    marks: tuple[int, ...]
    watch: tuple[str, ...]
    fused: bool = True

    @property
    def key(self) -> str:
        """The settings as one line of JSON."""
        return json.dumps(asdict(self), sort_keys=True)


def carry_out(run: Run) -> dict[str, Any]:
    """Train, and return what was found.

    Returns:
        "validation" and "test", a score at each mark; "loss", the training loss, the mean of the
        last steps up to each mark; "watched", by name a value at each mark, or the largest of all
        steps; "step_cpu_ms", the processor's time of the median step; "trained", how many numbers
        are.
    """
    task = TASKS[run.task](run.seed)
    model = adapted(run.row, task.model, run.rank, run.seed, run.fused)
    batches = torch.Generator().manual_seed(run.seed)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, weight_decay=0.0, fused=True)
    found: dict[str, Any] = {"validation": [], "test": [], "loss": [], "watched": {}}
    losses: list[float] = []
    seen, busy = Seen(model, task.model, task), []
    for done in range(1 + run.steps):
        if done:
            began = time.process_time()
            losses.append(_step(task, model, optimizer, batches, rate(run.q) * min(1.0, done / run.warmup)))
            busy.append(time.process_time() - began)
        for name in run.watch:
            if WATCHES[name].every_step:
                most = found["watched"].get(name, 0.0)
                found["watched"][name] = max(most, min(WATCHES[name].look(seen), BEYOND))
            elif done in run.marks:
                found["watched"].setdefault(name, []).append(_finite(WATCHES[name].look(seen)))
        if done in run.marks:
            model.eval()
            for part in ("validation", "test"):
                found[part].append(task.score(model, part))
            model.train()
            found["loss"].append(_finite(sum(losses[-LAST:]) / max(1, len(losses[-LAST:]))))
    found["step_cpu_ms"] = 1000 * median(busy)
    found["trained"] = sum(p.numel() for p in trained)
    return found


def _step(
    task: Task, model: torch.nn.Module, optimizer: torch.optim.Optimizer, batches: torch.Generator, lr: float
) -> float:
    for group in optimizer.param_groups:
        group["lr"] = lr
    optimizer.zero_grad()
    loss = task.loss(model, batches)
    loss.backward()
    optimizer.step()
    return loss.item()


def _finite(value: Any) -> Any:
    """Return a number that JSON knows, None for one that it doesn't."""
    return value if not isinstance(value, float) or math.isfinite(value) else None
