"""The fused mixture inside PyTorch: compile, checkpointing, autocast, layouts, limits, what is kept
for backward.
"""

from typing import Any

import pytest
import torch
import torch._dynamo.testing
from moe_calls import DROPOUT_P, VARIANTS, leaves_of, moe_arguments, results
from reference_calls import Maker
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import kept_bytes
from delora_kernels import functional as F
from delora_kernels import reference


def in_dtype(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Every float tensor in `dtype`."""

    def cast(value: Any) -> Any:
        return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value

    return {name: cast(value) for name, value in arguments.items()}


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def bound(arguments: dict[str, Any], **options: Any) -> Any:
    """The fused call as a function of keyword tensors."""
    return lambda **tensors: F.moe_lora_linear(**arguments | tensors | options)


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise_repeat(variant: str, seed: int) -> None:
    maker = Maker(seed)
    for dtype in (torch.float32, torch.bfloat16):
        arguments = in_dtype(moe_arguments(maker, variant, T=64, K=48, N=40), dtype)
        leaves, grad_out = leaves_of(arguments), maker.tensor(64, 40)
        function = bound(arguments, dropout_p=DROPOUT_P, seed=3)
        assert_equal(*(results(function, leaves, grad_out) for _ in range(2)))


@pytest.mark.parametrize(
    ("variant", "dynamic"),
    [*((variant, True) for variant in VARIANTS if variant != "residual"), ("topk", False), ("gates", False)],
)
def test_compile(variant: str, dynamic: bool, seed: int) -> None:
    """One graph, forward and backward, with both losses and both coefficients in it; numbers are
    symbols in one variant, which torch makes constants by tracing once more. "dora" has what
    "residual" has.
    """
    maker = Maker(seed)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    options: dict[str, Any] = {"dropout_p": DROPOUT_P, "balance_coef": 0.1, "z_coef": 0.1}

    def call(tensors: dict[str, Tensor], rest: dict[str, Any], seed: Tensor) -> Any:
        y, stats = F.moe_lora_linear(**tensors, **rest, **options, seed=seed)
        return y.relu(), stats

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic)
    frames = []
    for T in (8, 11, 13) if dynamic else (8,):
        arguments = in_dtype(moe_arguments(maker, variant, T=T), torch.float32)
        leaves = leaves_of(arguments)
        rest = {k: v for k, v in arguments.items() if k not in leaves}
        mask_seed, grad_out = torch.tensor(T), maker.tensor(T, 5)
        with torch._dynamo.config.patch(specialize_float=variant != "topk"):
            ours, theirs = (
                results(lambda f=f, r=rest, s=mask_seed, **tensors: f(tensors, r, s), leaves, grad_out)
                for f in (compiled, call)
            )
        assert_equal(ours, theirs)
        frames.append(counter.frame_count)
    assert not dynamic or frames[1] == frames[-1] <= 2


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing(variant: str, reentrant: bool, seed: int) -> None:
    """The masks repeat, and the losses' own gradients come once."""
    arguments = moe_arguments(Maker(seed), variant)
    names = list(leaves_of(arguments))

    def call(*values: Tensor) -> Tensor:
        tensors = dict(zip(names, values, strict=True))
        return F.moe_lora_linear(**arguments | tensors, dropout_p=DROPOUT_P, balance_coef=0.3, z_coef=0.2)[0]

    found = []
    for run in (call, lambda *values: checkpoint(call, *values, use_reentrant=reentrant)):
        torch.manual_seed(seed)
        leaves = leaves_of(arguments)
        y = run(*leaves.values())
        y.square().sum().backward()
        found.append({"y": y.detach()} | {k: v.grad for k, v in leaves.items()})
    assert_equal(*found)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_the_call_in_autocasts_dtype(variant: str, seed: int) -> None:
    maker = Maker(seed)
    narrowed = in_dtype(moe_arguments(maker, variant), torch.bfloat16)
    wide, grad_out = in_dtype(narrowed, torch.float32), maker.tensor(6, 5).bfloat16()
    leaves = leaves_of(wide)
    with torch.autocast("cpu", torch.bfloat16):
        ours = results(bound(wide), leaves, grad_out)
    assert ours["y"].dtype == torch.bfloat16
    assert {ours[name].dtype for name in leaves} == {ours["probability"].dtype} == {torch.float32}
    for name, value in results(bound(narrowed), leaves_of(narrowed), grad_out).items():
        if name != "gates":  # bfloat16 gates are a float32 tensor's to the other call
            assert torch.equal(ours[name].to(value.dtype), value), name


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts(variant: str, seed: int) -> None:
    """Transposed and strided tensors and gradients give what their contiguous copies give."""
    maker = Maker(seed)
    arguments = moe_arguments(maker, variant)
    strided = {
        k: v.transpose(0, -1).contiguous().transpose(0, -1) if isinstance(v, Tensor) and v.dim() > 1 else v
        for k, v in arguments.items()
    }
    leaves = {k: v.detach().requires_grad_() for k, v in strided.items() if k in leaves_of(arguments)}
    grad_out = maker.tensor(5, 6).t()
    theirs = results(bound(arguments, dropout_p=0.5, seed=2), leaves_of(arguments), grad_out.contiguous())
    for name, value in results(bound(strided, dropout_p=0.5, seed=2), leaves, grad_out).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "A", "B", "router", "gates"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_finite_in_not_finite_out(variant: str, name: str, bad: float, seed: int) -> None:
    """In y where the dense form has it: every expert's B meets every token, if only with a v
    of 0.
    """
    arguments = moe_arguments(Maker(seed), variant)
    if not isinstance(arguments.get(name), Tensor):
        return
    arguments[name].view(-1)[0] = bad
    y, _ = F.moe_lora_linear(**arguments | leaves_of(arguments))
    want, _ = reference.moe_lora_linear_dense(**arguments)
    assert torch.equal(y.isfinite(), want.isfinite())


@pytest.mark.parametrize("variant", VARIANTS)
def test_unwritten_memory_is_never_read(variant: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    maker = Maker(seed)
    arguments = in_dtype(moe_arguments(maker, variant, T=9), torch.float32)
    leaves, grad_out = leaves_of(arguments), maker.tensor(9, 5)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        found = results(bound(arguments, dropout_p=DROPOUT_P, seed=1), leaves, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in found.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_consumers_that_write_in_place(variant: str, seed: int) -> None:
    maker = Maker(seed)
    arguments, residual, grad_out = moe_arguments(maker, variant), maker.tensor(6, 5), maker.tensor(6, 5)
    leaves = leaves_of(arguments)
    y = F.moe_lora_linear(**arguments | leaves)[0]
    ours = torch.autograd.grad(y.mul_(2).add_(residual).relu_(), list(leaves.values()), grad_out)
    y = F.moe_lora_linear(**arguments | leaves)[0]
    theirs = torch.autograd.grad((y * 2 + residual).relu(), list(leaves.values()), grad_out)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_and_transforms_are_refused(variant: str, seed: int) -> None:
    arguments = moe_arguments(Maker(seed), variant)
    leaves = leaves_of(arguments)
    y, stats = F.moe_lora_linear(**arguments | leaves)
    total = y.square().sum() + stats.probability.square().sum()
    grads = torch.autograd.grad(total, list(leaves.values()), create_graph=True)
    for name, grad in zip(leaves, grads, strict=True):
        if name != "bias":
            with pytest.raises(RuntimeError, match="moe_lora_linear has no second derivative"):
                torch.autograd.grad(grad.square().sum(), leaves["A"], retain_graph=True)
    with pytest.raises(RuntimeError, match="does not support torch.func transforms; use delora_kernels.reference.moe"):
        torch.func.grad(lambda A: F.moe_lora_linear(**arguments | {"A": A})[0].sum())(arguments["A"])


@pytest.mark.parametrize("variant", ["topk", "residual"])
def test_kept_for_backward(variant: str) -> None:
    """Beyond x and the parameters at most 4 · T · (R + E) numbers, a residual's own columns
    included.
    """
    T, K, N, r, E = 512, 256, 384, 4, 8
    arguments = in_dtype(moe_arguments(Maker(0), variant, T, K, N, r, E), torch.float32)
    if variant == "residual":  # as large as the experts themselves, GOAT's
        arguments |= {"frozen_A": arguments["A"].clone(), "frozen_B": arguments["B"].clone(), "residual": 0.1}
    leaves = leaves_of(arguments)
    known = [*leaves.values(), *(v for v in arguments.values() if isinstance(v, Tensor))]
    kept = kept_bytes(lambda: F.moe_lora_linear(**arguments | leaves)[0], known)
    assert 0 < kept <= 4 * T * (r * E + E) * 4 + 4 * T + 1024  # the mask's shares, and vectors


def test_only_what_the_wanted_gradient_needs_is_kept() -> None:
    T, K, N, r, E = 64, 32, 48, 2, 4
    arguments = in_dtype(moe_arguments(Maker(0), "topk", T, K, N, r, E), torch.float32) | {"scale": torch.ones(E)}
    h, v, w, vector = T * (r * E + E) * 4, T * r * E * 4, T * E * 4, E * 4
    for name, want in {"x": h + w, "A": h + w, "B": h + w + v, "router": h + w}.items():
        leaves = leaves_of(arguments, (name,))
        known = [*leaves.values(), *(t for t in arguments.values() if isinstance(t, Tensor))]
        assert kept_bytes(lambda a=arguments | leaves: F.moe_lora_linear(**a)[0], known) == want + vector
