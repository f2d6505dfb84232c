"""How much a forward pass keeps for its backward pass."""

import weakref
from collections.abc import Callable

import torch
from torch import nn

MIB = 1024.0 * 1024.0


class _Kept:
    """A tensor that autograd keeps; gone once the graph lets go of it."""

    def __init__(self, tensor: torch.Tensor) -> None:
        self.tensor = tensor


def kept_mib(model: nn.Module, forward: Callable[[], torch.Tensor]) -> float:
    """MiB that autograd keeps between `forward()` and its backward pass, parameters and buffers left out.

    Each storage counts once and whole, however many saved tensors are views of it; what the forward pass itself lets
    go again, as a detached branch does, does not count.

    Args:
        model: its parameters and buffers are not counted: they are there anyway.
        forward: computes the loss; the backward pass runs here as well, and its gradients are dropped.
    """
    everything: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: torch.Tensor) -> _Kept:
        kept = _Kept(tensor)
        everything.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        loss = forward()
    resident = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    storages = (kept.tensor.untyped_storage() for kept in everything)
    sizes = {storage.data_ptr(): storage.nbytes() for storage in storages if storage.data_ptr() not in resident}
    loss.backward()
    model.zero_grad(set_to_none=True)
    return sum(sizes.values()) / MIB
