"""How much a forward pass of the model keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import nn

from benchmarks.memory import MIB, kept_bytes


def kept_mib(model: nn.Module, forward: Callable[[], torch.Tensor]) -> float:
    """MiB that autograd keeps between `forward()` and its backward pass, parameters and buffers
    left out.

    Args:
        model: its parameters and buffers are not counted: they are there anyway.
        forward: computes the loss.
    """
    return kept_bytes(forward, [*model.parameters(), *model.buffers()]) / MIB
