"""How a forward and backward pass is timed and weighed on a CPU."""

import gc
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

Pass = Callable[[], None]
MIB = 2**20


@dataclass(frozen=True)
class Times:
    """Milliseconds of one pass: the median and the 20th and 80th percentile."""

    median_ms: float
    p20_ms: float
    p80_ms: float


def interleaved(passes: dict[str, Pass], rounds: int, warmup: int = 3) -> dict[str, Times]:
    """Time every pass once a round, in turn, so that a machine that slows down or warms up does so for all of them."""
    seconds: dict[str, list[float]] = {name: [] for name in passes}
    for index in range(warmup + rounds):
        for name, run in passes.items():
            start = time.perf_counter()
            run()
            if index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: _times(values) for name, values in seconds.items()}


def _times(seconds: list[float]) -> Times:
    fifths = statistics.quantiles(seconds, n=5)
    return Times(*(1e3 * value for value in (statistics.median(seconds), fifths[0], fifths[-1])))


def kept_bytes(forward: Callable[[], Tensor], but: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps between forward and backward, each storage once, the storages of `but` left out."""
    known = {tensor.untyped_storage().data_ptr() for tensor in but}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in known:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = forward()
    total = sum(kept.values())  # while y, and with it the graph, is alive: addresses are not reused
    del y
    return total


@dataclass(frozen=True)
class Allocations:
    """Bytes allocated in all, and the most that were alive at once beyond what was alive before."""

    total: int
    peak: int


def allocations(run: Pass) -> Allocations:
    """Weigh one pass, inside custom ops too, by the profiler's record of every allocation and release."""
    run()  # what is allocated once and kept (library workspaces) is not the pass's
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    events = [e for e in record.profiler.kineto_results.events() if e.name() == "[memory]"]
    total = alive = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        total += max(0, event.nbytes())
        alive += event.nbytes()
        peak = max(peak, alive)
    return Allocations(total, peak)
