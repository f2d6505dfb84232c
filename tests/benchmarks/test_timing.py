"""How benchmarks time: in turn, the same code twice alike, a GPU's host hidden behind a filled
stream.
"""

import time
from typing import Any, ClassVar

import pytest
import torch

from benchmarks.timing import Budget, CpuClock, CudaClock, interleaved

FIVE = Budget(seconds=0, least=5, most=5, warmup=1)


def test_interleaved_takes_turns_and_changes_the_first() -> None:
    turns: list[str] = []
    passes = {name: lambda name=name: turns.append(name) for name in "abc"}
    times = interleaved(passes, CpuClock(), FIVE)
    assert "".join(turns) == "abc" + "bca" + "cab" + "abc" + "bca" + "cab"
    assert all(t.rounds == 5 and 0 <= t.p20_ms <= t.median_ms <= t.p80_ms for t in times.values())


def test_two_identical_passes_differ_by_less_than_five_percent() -> None:
    """The harness measures itself. Another process may take the core meanwhile: then the medians
    come together later.
    """
    x = torch.randn(384, 384)
    passes = {name: lambda: x @ x for name in ("one", "two")}
    apart = 1.0
    for rounds in (100, 400, 1600):
        times = interleaved(passes, CpuClock(), Budget(seconds=0, least=rounds, most=rounds))
        apart = abs(times["one"].median_ms / times["two"].median_ms - 1)
        if apart < 0.05:
            break
    assert apart < 0.05


def test_a_pass_twice_as_long_is_seen_to_be() -> None:
    passes = {"short": lambda: time.sleep(0.004), "long": lambda: time.sleep(0.008)}
    times = interleaved(passes, CpuClock(), FIVE)
    assert 1.5 < times["long"].median_ms / times["short"].median_ms < 2.5


def test_a_pass_that_fails_is_left_out_and_the_others_go_on() -> None:
    calls: list[int] = []

    def fails_later() -> None:
        calls.append(0)
        if len(calls) > 3:
            raise torch.OutOfMemoryError("no more")

    failures: list[tuple[str, Exception]] = []
    passes = {"good": lambda: None, "bad": fails_later}
    times = interleaved(passes, CpuClock(), FIVE, lambda *failure: failures.append(failure))
    assert list(times) == ["good"]
    assert times["good"].rounds == 5
    assert [(name, type(error)) for name, error in failures] == [("bad", torch.OutOfMemoryError)]
    with pytest.raises(torch.OutOfMemoryError):
        interleaved({"bad": fails_later}, CpuClock(), FIVE)


class FakeCuda:
    """A device with a clock of its own: work queues up behind what was launched before, the host
    runs ahead.
    """

    def __init__(self) -> None:
        self.device, self.host = 0.0, 0.0
        self.sleeps: list[float] = []

    def launch(self, device_ms: float, host_ms: float) -> None:
        self.host += host_ms
        self.device = max(self.device, self.host) + device_ms

    def _sleep(self, cycles: int) -> None:
        self.sleeps.append(cycles / CudaClock.CYCLES_PER_MS)
        self.launch(self.sleeps[-1], 0.0)

    def synchronize(self) -> None:
        self.host = max(self.host, self.device)

    def Event(self, enable_timing: bool) -> Any:
        cuda = self

        class Event:
            def record(self) -> None:
                self.at = max(cuda.device, cuda.host)

            def elapsed_time(self, other: Any) -> float:
                return float(other.at - self.at)

        return Event()


def test_cuda_times_are_the_devices_however_slow_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five launches of 0.01 ms of work that take the host 0.2 ms each: 0.05 ms on the device, 1 ms
    on the host.
    """
    cuda = FakeCuda()
    monkeypatch.setattr(time, "perf_counter", lambda: cuda.host / 1e3)

    def run() -> None:
        for _ in range(5):
            cuda.launch(0.01, 0.2)

    starved = cuda.Event(True), cuda.Event(True)
    starved[0].record()
    run()
    starved[1].record()
    assert starved[0].elapsed_time(starved[1]) > 1.0  # without the sleep, the host is what is timed

    flushes: list[float] = []
    clock = CudaClock(cuda, flush=lambda: flushes.append(cuda.device))
    times = interleaved({"a": run, "b": run}, clock, Budget(seconds=1e9, least=5, most=5, warmup=1))
    for spent in times.values():
        assert spent.median_ms == pytest.approx(0.05)
        assert spent.host_ms == pytest.approx(1.0)
    assert len(flushes) == len(cuda.sleeps) == 12  # before every pass, warm-up too
    assert cuda.sleeps[-1] == pytest.approx(3.0)  # three times what the host takes
    assert cuda.sleeps[0] == CudaClock.MOST_SLEEP_MS  # nothing known yet


def test_cuda_clock_reports_a_failing_pass() -> None:
    cuda = FakeCuda()

    def bad() -> None:
        raise torch.OutOfMemoryError("no more")

    spent = CudaClock(cuda, flush=lambda: None).round({"bad": bad, "good": lambda: cuda.launch(0.5, 0.0)})
    assert isinstance(spent["bad"], torch.OutOfMemoryError)
    assert spent["good"][0] == pytest.approx(0.5)  # type: ignore[index]


def test_gpu_memory_is_the_allocators_above_what_was_there() -> None:
    from delora_kernels.diagnostics.allocations import Allocations, _on_gpu

    class Allocator(FakeCuda):
        stats: ClassVar[dict[str, int]] = {
            "allocated_bytes.all.allocated": 1000,
            "allocated_bytes.all.current": 700,
            "allocated_bytes.all.peak": 900,
        }

        def reset_peak_memory_stats(self) -> None:
            self.stats = self.stats | {"allocated_bytes.all.peak": self.stats["allocated_bytes.all.current"]}

        def memory_stats(self) -> dict[str, int]:
            return dict(self.stats)

    allocator = Allocator()

    def run() -> None:
        allocator.stats = allocator.stats | {"allocated_bytes.all.allocated": 1600, "allocated_bytes.all.peak": 1200}

    assert _on_gpu(run, allocator) == Allocations(total=600, peak=500)
