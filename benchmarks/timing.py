"""How a pass is timed: in turn with its rivals, on a clock that fits the device.

    clock = clock_of("cuda")
    times = interleaved({"frozen": a, "dk": b}, clock, Budget())  # name → Times, in milliseconds

On a CPU the clock is `perf_counter`. On a GPU it is a pair of events on a stream that was filled
first: while it sleeps, the host issues the whole pass, so that the events enclose work and no
waiting for the host. Before each pass memory twice as large as the L2 cache is read, which leaves
inputs and weights cold (and nothing to write back); what the host takes to issue the pass is
measured beside it.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch

Pass = Callable[[], Any]


@dataclass(frozen=True)
class Times:
    """Milliseconds of one pass: median, 20th and 80th percentile, rounds; host_ms: the host's
    median to issue it.
    """

    median_ms: float
    p20_ms: float
    p80_ms: float
    rounds: int
    host_ms: float | None = None


@dataclass(frozen=True)
class Budget:
    """How often passes are timed.

    Args:
        seconds: No further round begins after this long, once there are `least` of them.
        least, most: Rounds.
        warmup: Rounds before, not counted.
    """

    seconds: float = 3.0
    least: int = 7
    most: int = 100
    warmup: int = 2


class Clock(Protocol):
    """Times one round of passes."""

    def round(self, passes: Mapping[str, Pass]) -> dict[str, tuple[float, float | None] | Exception]:
        """Run every pass once, in this order → (ms, host's ms) of each, or what it raised."""


class CpuClock:
    """perf_counter around each pass."""

    def round(self, passes: Mapping[str, Pass]) -> dict[str, tuple[float, float | None] | Exception]:
        """As Clock.round; there is no host beside the device."""
        spent: dict[str, tuple[float, float | None] | Exception] = {}
        for name, run in passes.items():
            start = time.perf_counter()
            try:
                run()
            except Exception as error:
                spent[name] = error
            else:
                spent[name] = 1e3 * (time.perf_counter() - start), None
        return spent


class CudaClock:
    """Event pairs on a filled stream, cold caches; see the module.

    Args:
        cuda: torch.cuda, or what stands in for it in tests.
        flush: Reads more than the L2 cache holds; None: a tensor made for it.
    """

    CYCLES_PER_MS = 2_000_000
    """At 2 GHz, which no current GPU exceeds: a slower clock only sleeps longer."""
    LEAST_SLEEP_MS, MOST_SLEEP_MS = 0.3, 50.0

    def __init__(self, cuda: Any = torch.cuda, flush: Pass | None = None) -> None:
        self.cuda = cuda
        self.flush = flush or self._reader()
        self.host_ms: dict[str, float] = {}

    def _reader(self) -> Pass:
        size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        cold = torch.zeros(max(size, 2**20) // 4, device="cuda")
        sink = torch.empty((), device="cuda")
        return lambda: torch.sum(cold, dim=0, out=sink)

    def round(self, passes: Mapping[str, Pass]) -> dict[str, tuple[float, float | None] | Exception]:
        """As Clock.round; the sleep before a pass is three times what the host took to issue it
        before.
        """
        events: dict[str, tuple[Any, Any, float]] = {}
        spent: dict[str, tuple[float, float | None] | Exception] = {}
        for name, run in passes.items():
            expected = 3 * self.host_ms.get(name, self.MOST_SLEEP_MS / 3)
            sleep = min(max(expected, self.LEAST_SLEEP_MS), self.MOST_SLEEP_MS)
            self.cuda._sleep(int(sleep * self.CYCLES_PER_MS))
            self.flush()
            start, end = (self.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            began = time.perf_counter()
            try:
                run()
            except Exception as error:
                spent[name] = error
                continue
            self.host_ms[name] = host = 1e3 * (time.perf_counter() - began)
            end.record()
            events[name] = start, end, host
        self.cuda.synchronize()
        return spent | {name: (start.elapsed_time(end), host) for name, (start, end, host) in events.items()}


def clock_of(device: str) -> Clock:
    """Return the clock of a device: "cpu", "cuda", "cuda:1"."""
    return CudaClock() if device.startswith("cuda") else CpuClock()


def interleaved(
    passes: Mapping[str, Pass], clock: Clock, budget: Budget, failed: Callable[[str, Exception], None] | None = None
) -> dict[str, Times]:
    """Sum up what `rounds` finds, arguments as there: name → times of the passes that never
    raised.
    """
    return {name: _times(spent) for name, spent in rounds(passes, clock, budget, failed).items()}


def rounds(
    passes: Mapping[str, Pass], clock: Clock, budget: Budget, failed: Callable[[str, Exception], None] | None = None
) -> dict[str, list[tuple[float, float | None]]]:
    """Time every pass once a round, so that a machine that slows down or warms up does so for all
    of them.

    The first of a round is the second-last of the next: no pass always follows the same one at the
    same place.

    Args:
        passes: Name → pass.
        clock: Of the device.
        budget: How many rounds.
        failed: Called with a pass that raised; it is left out of the rest and of the result. None:
            raise.

    Returns:
        Name → (ms, host's ms) of every round, of the passes that never raised.
    """
    names = list(passes)
    spent: dict[str, list[tuple[float, float | None]]] = {name: [] for name in names}
    index, began = 0, time.perf_counter()
    while names and index < budget.warmup + budget.most:
        if index == budget.warmup:
            began = time.perf_counter()
        elif index >= budget.warmup + budget.least and time.perf_counter() - began > budget.seconds:
            break
        turn = index % len(names)
        for name, result in clock.round({name: passes[name] for name in names[turn:] + names[:turn]}).items():
            if isinstance(result, Exception):
                if failed is None:
                    raise result
                failed(name, result)
                names.remove(name)
            elif index >= budget.warmup:
                spent[name].append(result)
        index += 1
    return {name: spent[name] for name in names}


def _times(spent: list[tuple[float, float | None]]) -> Times:
    milliseconds = [device for device, _ in spent]
    fifths = statistics.quantiles(milliseconds, n=5) if len(spent) > 1 else milliseconds * 2
    hosts = [host for _, host in spent if host is not None]
    host = statistics.median(hosts) if hosts else None
    return Times(statistics.median(milliseconds), fifths[0], fifths[-1], len(spent), host)


def captured(run: Pass) -> Pass:
    """Return the pass as a CUDA graph's replay: the same kernels without the host's part.

    Raises:
        RuntimeError: the pass can't be captured (it synchronises, or allocates outside the pool).
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay
