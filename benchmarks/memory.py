"""What a pass keeps for backward, in bytes; what it allocates is weighed by the package itself
(delora_kernels/diagnostics/allocations.py).
"""

import gc
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from delora_kernels.diagnostics.allocations import MIB, Allocations, allocations

__all__ = ["MIB", "Allocations", "allocations", "kept_bytes", "only_new_garbage"]


class _Kept:
    """A tensor that autograd keeps; gone once the graph lets go of it."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(forward: Callable[[], Tensor], but: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, the storages of `but` left out.

    Each storage counts once and whole, however many saved tensors are views of it; what the forward
    pass itself lets go again, as a detached branch does, does not count.
    """
    everything: weakref.WeakSet[_Kept] = weakref.WeakSet()

    def pack(tensor: Tensor) -> _Kept:
        kept = _Kept(tensor.detach())  # a result that kept its own graph would never be gone
        everything.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.tensor):
        y = forward()
    known = {storage.data_ptr() for tensor in but for storage in _storages(tensor)}
    storages = (storage for kept in everything for storage in _storages(kept.tensor))
    sizes = {s.data_ptr(): s.nbytes() for s in storages if s.data_ptr() not in known}
    del y
    return sum(sizes.values())


def _storages(tensor: Any) -> Iterator[torch.UntypedStorage]:
    """Yield the storage of a tensor, or those of the tensors that one of a subclass is made of."""
    if not is_traceable_wrapper_subclass(tensor):
        yield tensor.untyped_storage()
        return
    names, _ = tensor.__tensor_flatten__()
    for name in names:
        yield from _storages(getattr(tensor, name))


@contextmanager
def only_new_garbage() -> Iterator[None]:
    """Collect garbage once, then let every further gc.collect() look at new objects alone.

    Whole libraries are loaded, and looking through all they have made takes a good part of a
    second; what a measurement must be rid of, before it weighs or after it failed, is its own.
    Where the process has frozen them before, that is enough, and stays.
    """
    frozen = gc.get_freeze_count() > 0
    gc.collect()
    if not frozen:
        gc.freeze()
    try:
        yield
    finally:
        if not frozen:
            gc.unfreeze()
