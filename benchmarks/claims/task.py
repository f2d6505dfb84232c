"""What a task is: a pretrained model, and data of which each part has its own use."""

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TARGETS = ("query", "key", "value", "out", "up", "down", "dense")
"""What the linears that are adapted are called, in the models of all tasks."""


class Problem(Exception):
    """Something the user can put right; its text is one line that says what and how."""


class Split(NamedTuple):
    """One part of the data: inputs and classes."""

    x: Tensor
    y: Tensor


class Task(NamedTuple):
    """One seed's task.

    Attributes:
        model: pretrained and frozen; runs adapt copies of it.
        parts: "train", "validation" (to choose a rate on) and "test" (to report).
        batch: rows of a step.
    """

    model: nn.Module
    parts: dict[str, Split]
    batch: int

    def loss(self, model: nn.Module, generator: torch.Generator) -> Tensor:
        """Cross-entropy of a random batch."""
        data = self.parts["train"]
        rows = torch.randint(len(data.x), (self.batch,), generator=generator)
        return F.cross_entropy(model(data.x[rows]), data.y[rows])

    @torch.no_grad()
    def score(self, model: nn.Module, part: str) -> float:
        """Accuracy on one part; 0 where a logit is not finite."""
        data = self.parts[part]
        logits = model(data.x)
        return float((logits.argmax(-1) == data.y).float().mean()) if bool(logits.isfinite().all()) else 0.0
