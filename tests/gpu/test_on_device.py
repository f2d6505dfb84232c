"""The Triton and the compiled kernels on a CUDA device: every op in every form, and what no CPU can
show.

Run by `make gpu-check`. Errors are held against eager PyTorch's on the same device and dtype, as
everywhere.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from kernel_calls import DTYPES
from torch import Tensor

if not torch.cuda.is_available():
    pytest.skip("needs a CUDA device (make gpu-check)", allow_module_level=True)

from delora_kernels import backends, use_backend
from delora_kernels import functional as F
from delora_kernels.backends.triton import forms
from delora_kernels.testing import METHODS, OPS, failures, measure
from delora_kernels.testing.ops.problems import op_problems

WAYS = {"cuda": None} | {f"triton-{name}": name for name in (forms.UPDATE, forms.PREFILL, forms.OWN)}


@pytest.fixture(params=WAYS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """The backend that runs all, in one of its forms."""
    name, form = request.param.partition("-")[0], WAYS[request.param]
    reason = backends.unavailable(name)
    if reason is not None:
        pytest.skip(reason)
    if form is not None:
        monkeypatch.setattr(forms, "DEFAULT", form)
    with use_backend(name):
        yield name


@pytest.mark.parametrize("sizes", [(7, 19, 13, 3), (300, 264, 520, 20), (1, 128, 64, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_op(
    name: str, dtype: str, sizes: tuple[int, ...], backend: str, request: pytest.FixtureRequest, seed: int
) -> None:
    """(300, 264, 520): several tiles, strides that descriptors take."""
    if WAYS[request.node.callspec.params["backend"]] in (forms.PREFILL, forms.OWN):
        if name not in ("expand", "input_backward"):
            pytest.skip("the forms differ in two ops")
    narrow, wide = DTYPES[dtype]
    for problem in op_problems(name, *sizes, backend=backend, dtype=narrow, rank_dtype=wide, device="cuda", seed=seed):
        assert failures(problem) == []


@pytest.mark.parametrize("name", OPS)
def test_op_in_tf32(name: str, backend: str, seed: int) -> None:
    """As exact as eager PyTorch where both may multiply float32 as tf32, and h is off by what that
    rounds.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        measured = [
            m
            for problem in op_problems(
                name, 300, 264, 520, 20, backend=backend, dtype=torch.float32, device="cuda", seed=seed
            )
            for m in measure(problem)
        ]
    finally:
        torch.set_float32_matmul_precision(before)
    assert [m for m in measured if not m.ok] == []
    assert name != "project" or max(m.error for m in measured) > 1e-5


@pytest.mark.parametrize("name", METHODS)
def test_automatic_choice(name: str) -> None:
    """It takes the first backend that is here, whose kernels prove themselves."""
    here = [backend for backend in backends.NAMES if backends.unavailable(backend) is None]
    for adapter_dtype in (torch.bfloat16, torch.float32):
        inputs = METHODS[name].draw(7, 19, 13, 3, dtype=torch.bfloat16, adapter_dtype=adapter_dtype, device="cuda")
        assert METHODS[name].call(inputs).options.backend == here[0]


def lora(seed: int, T: int = 512, K: int = 1024, N: int = 768, r: int = 16) -> dict[str, Tensor]:
    generator = torch.Generator("cuda").manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device="cuda", dtype=torch.bfloat16)

    made = {"x": normal(T, K), "weight": normal(N, K) / K**0.5, "A": normal(r, K) / K**0.5, "B": normal(N, r)}
    return {name: value.requires_grad_(name != "weight") for name, value in made.items()}


def step(made: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients of x, A and B."""
    y = F.lora_linear(**made)
    return [y, *torch.autograd.grad(y, [made[name] for name in ("x", "A", "B")], dy)]


@pytest.mark.parametrize("method", METHODS)
def test_the_same_bits_every_time(method: str, backend: str, seed: int) -> None:
    arguments = METHODS[method].draw(520, 264, 392, 16, dtype=torch.bfloat16, device="cuda", seed=seed)
    first = METHODS[method].fused(arguments)
    for _ in range(3):
        assert all(torch.equal(value, first[name]) for name, value in METHODS[method].fused(arguments).items())


def test_cuda_graph(backend: str, seed: int) -> None:
    """A replay gives what the same kernels gave when they were launched one by one."""
    made, dy = lora(seed), torch.ones(512, 768, device="cuda", dtype=torch.bfloat16)
    expected = _on_side_stream(lambda: step(made, dy))  # warm-up, as capture wants it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = step(made, dy)
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_another_stream(backend: str, seed: int) -> None:
    """Kernels run on the current stream: a slow producer on it is waited for."""
    made, dy = lora(seed), torch.ones(512, 768, device="cuda", dtype=torch.bfloat16)
    expected, right = step(made, dy), made["x"].detach().clone()

    def late() -> list[Tensor]:
        with torch.no_grad():
            made["x"].zero_()
            torch.cuda._sleep(50_000_000)
            made["x"].copy_(right)
        return step(made, dy)

    assert all(torch.equal(a, b) for a, b in zip(_on_side_stream(late), expected, strict=True))


def _on_side_stream(run: Callable[[], list[Tensor]]) -> list[Tensor]:
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        results = run()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    return results


def test_more_elements_than_an_int32_counts(backend: str, seed: int) -> None:
    """The last rows of a [T, N] tensor beyond 2³¹ elements are what they are alone."""
    T, K, N = 520_000, 64, 4224
    assert T * N > 2**31
    if torch.cuda.mem_get_info()[0] < 24 * 2**30:
        pytest.skip("needs 24 GiB of free memory")
    made = lora(seed, T, K, N)
    dy = torch.ones(1, N, device="cuda", dtype=torch.bfloat16).expand(T, N)
    y, dx, _, _ = step(made, dy.contiguous())
    tail = made | {"x": made["x"][-64:].detach().requires_grad_()}
    y_tail, dx_tail, _, _ = step(tail, dy[-64:].contiguous())
    eps = torch.finfo(torch.bfloat16).eps
    for whole, alone in ((y, y_tail), (dx, dx_tail)):
        assert (whole[-64:].float() - alone.float()).abs().max() <= 2 * eps * alone.float().abs().max()
