"""What a task is: a pretrained model, and data of which each part has its own use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = (
    *("query", "key", "value", "out", "up", "down", "dense"),
    *("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
)
"""What the linears that are adapted are called, in the models of all tasks."""


class Problem(Exception):
    """Something the user can put right; its text is one line that says what and how."""


class Split(NamedTuple):
    """One part of the data: inputs, and a class for each or for each place of each."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """One seed's task.

    Attributes:
        model: pretrained and frozen; runs adapt copies of it.
        parts: "train", "validation" (to choose a rate on) and "test" (to report).
        batch: rows of a step.
        at_once: rows that are scored at a time; None: all.
    """

    model: nn.Module
    parts: dict[str, Split]
    batch: int
    at_once: int | None = None

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Cross-entropy of a random batch."""
        data = self.parts["train"]
        rows = torch.randint(len(data.x), (self.batch,), generator=generator)
        return F.cross_entropy(model(data.x[rows]).flatten(0, -2), data.y[rows].flatten())

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        """Accuracy on one part; 0 where a logit is not finite."""
        data, right = self.parts[part], 0
        for x, y in zip(*(some.split(self.at_once or len(data.x)) for some in data), strict=True):
            logits = model(x)
            if not bool(logits.isfinite().all()):
                return 0.0
            right += int((logits.argmax(-1) == y).sum())
        return right / data.y.numel()
