"""What one pass allocates and holds at its peak, in bytes above what was there before.

On a CPU from the profiler's record of every allocation, inside custom ops too; on a GPU from its
allocator.
"""

import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

MIB = 2**20


@dataclass(frozen=True)
class Allocations:
    """Bytes allocated in all, and the most that were alive at once beyond what was alive before."""

    total: int
    peak: int


def allocations(run: Callable[[], Any], device: str = "cpu", warm: bool = False) -> Allocations:
    """Weigh one pass on `device`; unless its like is `warm`, it runs once before, for what is
    allocated once and kept (library workspaces).
    """
    if not warm:
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
