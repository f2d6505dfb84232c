"""What a layer keeps, allocates and holds at its peak, against PEFT on the same tensors; and the measures."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.layer.cases import Case
from benchmarks.layer.measure import Allocations, Times, allocations, interleaved, kept_bytes

T, K, N, R = 128, 512, 1408, 16  # a CPU without bfloat16 units takes minutes for more
TWO_BYTES = 2


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_kept_for_backward(method: str) -> None:
    """At most 2·T·R numbers and one copy of A and B in x's dtype; DoRA one [T, N] more."""
    case = Case(method, "bf16-autocast", T, K, N, R)
    allowed = (2 * T * R + R * (K + N)) * TWO_BYTES + (T * N * TWO_BYTES if method == "dora" else 0)
    vectors = 4 * (N + 2 * R) * TWO_BYTES
    known = [case.x, *case.layer.parameters(), *case.layer.buffers()]
    assert 0 < kept_bytes(case.forwards()["dk"], known) <= allowed + vectors


@pytest.mark.parametrize(("method", "peak"), [("lora", 0.5), ("dora", 0.25), ("delora", 0.5)])
def test_allocated_against_peft(method: str, peak: float) -> None:
    case = Case(method, "bf16-autocast", T, K, N, R)
    ours, theirs = (allocations(case.passes()[impl]) for impl in ("dk", "peft"))
    assert ours.total <= 0.4 * theirs.total
    assert ours.peak - gemm_scratch() <= peak * theirs.peak


def gemm_scratch() -> int:
    """What the frozen GEMM of dx allocates for itself: nothing on some CPUs, a packed copy of dy or W on others."""
    dy, W = torch.zeros(T, N, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16)
    return allocations(lambda: torch.mm(dy, W)).peak - T * K * TWO_BYTES


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16-fp32", "fp32"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_nothing_of_xs_size_in_a_wider_dtype(method: str, precision: str) -> None:
    """No single allocation reaches the size of a float32 copy of x, dy or W, nor of BA or an identity matrix.

    All-float32 tensors are of that size themselves: there, the count of [T, K], [T, N] and [N, K] allocations is what
    the traffic contract allows: y, dx, and for DoRA the tensor it keeps and one transient.
    """
    T, K, N = 640, 700, 660
    sizes = _allocation_sizes(Case(method, precision, T, K, N, 8).passes()["dk"])
    element = 4 if precision == "fp32" else 2
    smallest = min(T * K, T * N, N * K) * element
    large = [size for size in sizes if size >= smallest]
    assert len(large) <= (4 if method == "dora" else 2)
    assert all(size <= max(T * K, T * N) * element for size in large)


def _allocation_sizes(run: Callable[[], None]) -> list[int]:
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    return [e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]


def test_row_norm_has_bounded_temporaries() -> None:
    from delora_kernels import ops

    W, A, B = torch.zeros(4096, 4096, dtype=torch.bfloat16), torch.zeros(16, 4096), torch.zeros(4096, 16)
    with torch.no_grad():
        assert allocations(lambda: ops.row_norm(W, A, B, 1.0, None, False, "eager")).peak <= 32 * 2**20


def test_lean_dora_keeps_no_private_tensor() -> None:
    from delora_kernels import functional as F

    x, W, A, B = torch.ones(64, 32), torch.ones(48, 32), torch.ones(4, 32), torch.ones(48, 4)
    m = torch.ones(48, requires_grad=True)
    y: list[Tensor] = []

    def forward(saved: str) -> Tensor:
        y[:] = [F.dora_linear(x, W, A, B, m, saved=saved)]
        return y[0]

    private = kept_bytes(lambda: forward("private"), [x, W, A, B, m])
    output = kept_bytes(lambda: forward("output"), [x, W, A, B, m])
    assert private - output <= 48 * 4  # y in the place of the private tensor; the divisor is m itself
    assert kept_bytes(lambda: forward("output"), [x, W, A, B, m, *y]) >= output - 64 * 48 * 4


@pytest.mark.parametrize("needs", ["x", "A", "B", "magnitude", "bias"])
def test_only_what_the_wanted_gradient_needs_is_kept(needs: str) -> None:
    from delora_kernels import functional as F

    arguments: dict[str, Any] = {"x": torch.ones(64, 32), "weight": torch.ones(48, 32), "bias": torch.ones(48)}
    arguments |= {"A": torch.ones(4, 32), "B": torch.ones(48, 4), "magnitude": torch.ones(48)}
    arguments[needs].requires_grad_()
    kept = kept_bytes(lambda: F.dora_linear(**arguments), arguments.values())
    h, private, c = 64 * 4 * 4, 64 * 48 * 4, 48 * 4
    assert kept == {"x": c, "A": c, "B": c + h, "magnitude": 2 * c + h + private, "bias": c}[needs]


def test_kept_bytes_counts_storages_once() -> None:
    a, b = torch.ones(10, 10, requires_grad=True), torch.ones(10, 10)
    assert kept_bytes(lambda: a * b, [a, b]) == 0
    assert kept_bytes(lambda: a * b, [a]) == 400
    assert kept_bytes(lambda: a.exp().square(), [a]) == 400  # exp's result, kept by exp and by square


def test_allocations_sees_inside_and_the_peak() -> None:
    def run() -> None:
        for _ in range(3):
            torch.empty(1 << 20, dtype=torch.uint8)
        a, b = torch.empty(1 << 20, dtype=torch.uint8), torch.empty(1 << 20, dtype=torch.uint8)
        del a, b

    assert allocations(run) == Allocations(total=5 << 20, peak=2 << 20)


def test_interleaved_takes_turns() -> None:
    turns: list[str] = []
    times = interleaved({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, rounds=5, warmup=1)
    assert turns == ["a", "b"] * 6
    assert all(isinstance(t, Times) and 0 <= t.p20_ms <= t.median_ms <= t.p80_ms for t in times.values())
