"""How much a forward pass keeps for its backward pass."""

from collections.abc import Callable

import torch
from torch import nn

MIB = 1024.0 * 1024.0


def kept_mib(model: nn.Module, forward: Callable[[], torch.Tensor]) -> float:
    """MiB that autograd keeps between `forward()` and its backward pass, parameters and buffers left out.

    Each storage counts once and whole, however many saved tensors are views of it.

    Args:
        model: its parameters and buffers are not counted: they are there anyway.
        forward: computes the loss; the backward pass runs here as well, and its gradients are dropped.
    """
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in resident:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward()
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(kept.values()) / MIB
