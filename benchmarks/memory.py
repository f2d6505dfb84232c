"""What a pass keeps, allocates and holds at its peak, in bytes above what was there before.

On a CPU from the profiler's record of every allocation, inside custom ops too; on a GPU from its
allocator.
"""

import gc
import os
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

MIB = 2**20


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


@dataclass(frozen=True)
class Allocations:
    """Bytes allocated in all, and the most that were alive at once beyond what was alive before."""

    total: int
    peak: int


def allocations(run: Callable[[], Any], device: str = "cpu") -> Allocations:
    """Weigh one pass on `device`; it runs once before, for what is allocated once and kept (library
    workspaces).
    """
    run()
    gc.collect()
    return _on_gpu(run) if device.startswith("cuda") else _on_cpu(run)


def _on_cpu(run: Callable[[], Any]) -> Allocations:
    with _quiet(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    total = alive = peak = 0
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += max(0, event.nbytes())
        alive += event.nbytes()
        peak = max(peak, alive)
    return Allocations(total, peak)


@contextmanager
def _quiet() -> Iterator[None]:
    """Shut standard error, below Python: some builds of torch's profiler write a line there
    whenever it starts.
    """
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)


def _on_gpu(run: Callable[[], Any], cuda: Any = torch.cuda) -> Allocations:
    cuda.synchronize()
    cuda.reset_peak_memory_stats()
    before = cuda.memory_stats()
    run()
    cuda.synchronize()
    after = cuda.memory_stats()
    total = after["allocated_bytes.all.allocated"] - before["allocated_bytes.all.allocated"]
    return Allocations(total, after["allocated_bytes.all.peak"] - before["allocated_bytes.all.current"])
