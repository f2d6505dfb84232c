"""What a layer keeps, allocates and holds at its peak, against PEFT on the same tensors; and the
measures.
"""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.cases import Case
from benchmarks.layer.rivals import Implementation, Layer
from benchmarks.memory import Allocations, allocations, kept_bytes, only_new_garbage

T, K, N, R = 128, 512, 1408, 16  # a CPU without bfloat16 units takes minutes for more
TWO_BYTES = 2


def layer(method: str, precision: str = "bf16-autocast", sizes: tuple[int, int, int, int] = (T, K, N, R)) -> Layer:
    return Layer(Case(method, "", *sizes, precision), "cpu")


def kept(made: Layer, implementation: Implementation) -> int:
    return kept_bytes(implementation.forward, made.tensors)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_kept_for_backward(method: str) -> None:
    """At most 2·T·R numbers; DoRA one [T, N] more."""
    made = layer(method)
    allowed = 2 * T * R * TWO_BYTES + (T * N * TWO_BYTES if method == "dora" else 0)
    vectors = 4 * (N + 2 * R) * TWO_BYTES
    assert 0 < kept(made, made.implementation("dk")) <= allowed + vectors


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16-fp32"])
@pytest.mark.parametrize("tokens", [1, 16])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_never_more_kept_than_peft_keeps(method: str, tokens: int, precision: str) -> None:
    """With few tokens too: nothing is kept that A and B give back."""
    made = layer(method, precision, (tokens, K, N, R))
    ours, theirs = (kept(made, made.implementation(name)) for name in ("dk", "peft"))
    assert ours <= theirs


@pytest.mark.parametrize(("method", "peak"), [("lora", 0.5), ("dora", 0.25), ("delora", 0.5)])
def test_allocated_against_peft(method: str, peak: float) -> None:
    made = layer(method)
    ours, theirs = (allocations(made.implementation(name).run) for name in ("dk", "peft"))
    scratch = gemm_scratch()
    assert ours.total - scratch <= 0.4 * (theirs.total - scratch)
    assert ours.peak - scratch <= peak * theirs.peak


def gemm_scratch() -> int:
    """What the frozen GEMM of dx allocates for itself: nothing on some CPUs, a packed copy of dy or
    W on others.
    """
    dy, W = torch.zeros(T, N, dtype=torch.bfloat16), torch.zeros(N, K, dtype=torch.bfloat16)
    return allocations(lambda: torch.mm(dy, W)).peak - T * K * TWO_BYTES


@pytest.mark.parametrize("precision", ["bf16-autocast", "bf16-fp32", "fp32"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_nothing_of_xs_size_in_a_wider_dtype(method: str, precision: str) -> None:
    """No single allocation reaches the size of a float32 copy of x, dy or W, nor of BA or an
    identity matrix.

    All-float32 tensors are of that size themselves: there, the count of [T, K], [T, N] and [N, K]
    allocations is what the traffic contract allows: y, dx, and for DoRA the tensor it keeps and one
    transient.
    """
    T, K, N = 640, 700, 660
    sizes = _allocation_sizes(layer(method, precision, (T, K, N, 8)).implementation("dk").run)
    element = 4 if precision == "fp32" else 2
    smallest = min(T * K, T * N, N * K) * element
    large = [size for size in sizes if size >= smallest]
    assert len(large) <= (4 if method == "dora" else 2)
    assert all(size <= max(T * K, T * N) * element for size in large)


def test_dora_without_gradients_writes_its_output_alone() -> None:
    T, K, N = 640, 700, 660
    forward = layer("dora", "fp32", (T, K, N, 8)).implementation("dk").forward

    def run() -> None:
        with torch.no_grad():
            forward()

    assert [size for size in _allocation_sizes(run) if size >= T * N * 4] == [T * N * 4]


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


class _InACycle:
    """Gone only once the garbage collector has been there."""

    def __init__(self) -> None:
        self.itself = self


@pytest.mark.parametrize("frozen", [True, False])
def test_garbage_of_before_and_of_the_measurement_is_collected(frozen: bool) -> None:
    """Also where the process has frozen what it loaded, as the tests do, and then nothing is let
    loose.
    """
    assert gc.get_freeze_count() > 0
    if not frozen:
        gc.unfreeze()
    try:
        before = weakref.ref(_InACycle())
        with only_new_garbage():
            assert before() is None
            assert gc.get_freeze_count() > 0
            own = weakref.ref(_InACycle())
            gc.collect()
            assert own() is None
        assert (gc.get_freeze_count() > 0) == frozen
    finally:
        gc.freeze()


@pytest.mark.parametrize("implementation", ["dk", "peft", "addmm"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_kept_bytes_agree_with_what_the_profiler_sees_alive(method: str, implementation: str) -> None:
    """Between forward and backward alive are y and what is kept: two counts, of hooks and of
    allocations.
    """
    made = layer(method, "fp32", (256, 320, 384, 8))
    built = made.implementation(implementation)
    y: list[Tensor] = []
    alive = _alive_after(lambda: y.append(built.forward())) - y[-1].nbytes
    assert kept(made, built) == pytest.approx(alive, rel=0.02, abs=256)


@pytest.mark.parametrize("implementation", ["frozen", "peft", "addmm"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_peak_agrees_with_the_life_of_every_storage(method: str, implementation: str) -> None:
    """Plain torch ops: a dispatch mode that sees every result, and when its storage goes, is a
    second count.

    Of PEFT's the forward pass alone: where gradients of x meet, autograd adds in place, but not
    under a mode.
    """
    built = layer(method, "fp32", (256, 320, 384, 8)).implementation(implementation)
    run = built.forward if implementation == "peft" else built.run
    assert allocations(run).peak == pytest.approx(_Storages().peak_of(run), rel=0.02)


def test_kept_bytes_leaves_out_what_a_detached_branch_let_go() -> None:
    a = torch.ones(10, 10, requires_grad=True)
    assert kept_bytes(lambda: a * a.exp().square().detach(), [a]) == 400  # the factor of a alone


class _Storages(torch.utils._python_dispatch.TorchDispatchMode):
    """Bytes of the storages that ops returned and that are still there."""

    def peak_of(self, run: Callable[[], Any]) -> int:
        self.alive, self.peak = 0, 0
        self.seen: set[int] = set()
        with self:
            run()
        return self.peak

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {t.untyped_storage()._cdata for t in torch.utils._pytree.tree_leaves((args, kwargs)) if _is(t)}
        result = func(*args, **kwargs or {})
        for tensor in torch.utils._pytree.tree_leaves(result):
            if _is(tensor) and tensor.untyped_storage()._cdata not in given | self.seen:
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        self.seen.add(storage._cdata)
        self.alive += storage.nbytes()
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, identity: int, size: int) -> None:
        self.seen.discard(identity)
        self.alive -= size


def _is(value: Any) -> bool:
    return isinstance(value, Tensor)


def _alive_after(run: Callable[[], Any]) -> int:
    from torch.profiler import ProfilerActivity, profile

    run()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
        run()
    return sum(e.nbytes() for e in record.profiler.kineto_results.events() if e.name() == "[memory]")
