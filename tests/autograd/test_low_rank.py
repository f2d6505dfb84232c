"""All low-rank methods at once (DoRA alone: test_dora.py) inside PyTorch: compile, checkpointing,
autocast, layouts, in-place consumers, limits.
"""

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from fused_calls import both, leaves_of
from reference_calls import VARIANTS, Maker, function_of
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from delora_kernels import functional, ops, use_backend
from delora_kernels.backends import eager
from delora_kernels.op_arguments import Masks

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def gradients(function: Any, leaves: dict[str, Tensor], grad_out: Tensor) -> dict[str, Tensor]:
    """y and every gradient, by name."""
    y = function(**leaves)
    return {"y": y.detach()} | dict(
        zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_out.to(y.dtype)), strict=True)
    )


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    """The same names, dtypes and bits."""
    assert {k: v.dtype for k, v in ours.items()} == {k: v.dtype for k, v in theirs.items()}
    assert [name for name in theirs if not torch.equal(ours[name], theirs[name])] == []


def narrow(arguments: dict[str, Any], dtype: torch.dtype, factor_dtype: torch.dtype) -> dict[str, Any]:
    """The same call with x, weight and bias in `dtype` and every factor in `factor_dtype`."""
    base = ("x", "weight", "bias")
    return {k: v.to(dtype if k in base else factor_dtype) if isinstance(v, Tensor) else v for k, v in arguments.items()}


@pytest.mark.parametrize("variant", VARIANTS)
def test_bitwise_repeat(variant: str, seed: int) -> None:
    maker = Maker(seed)
    for dtype in DTYPES:
        arguments = narrow(maker.arguments(variant, T=64, K=48, N=40), dtype, torch.float32)
        fused, _ = both(variant, arguments, 5)
        leaves, grad_out = leaves_of(arguments), maker.tensor(64, 40)
        assert_equal(gradients(fused, leaves, grad_out), gradients(fused, leaves, grad_out))


@pytest.mark.parametrize(("dtype", "factor_dtype"), list(itertools.product(DTYPES, (*DTYPES, torch.float64))), ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_dtypes(variant: str, dtype: torch.dtype, factor_dtype: torch.dtype, seed: int) -> None:
    """y has weight's dtype, each gradient that of its tensor, and rounding is all that differs from
    float64.
    """
    maker = Maker(seed)
    arguments = narrow(maker.arguments(variant, T=33, K=40, N=24), dtype, factor_dtype)
    wide = narrow(arguments, torch.float64, torch.float64)
    grad_out = maker.tensor(33, 24).to(dtype)
    leaves = leaves_of(arguments)
    ours = gradients(both(variant, arguments, 5)[0], leaves, grad_out)
    theirs = gradients(both(variant, wide, 5)[1], leaves_of(wide), grad_out)
    assert ours["y"].dtype == dtype
    assert {k: ours[k].dtype for k in leaves} == {k: v.dtype for k, v in leaves.items()}
    eps = max(torch.finfo(dtype).eps, torch.finfo(factor_dtype).eps)
    for name, value in theirs.items():
        scale = (
            grad_out.double().norm() * theirs["y"].norm()
            if name == "lam"
            else value.abs().max()  # one number: what it is the sum of
        )
        # at most eight roundings follow one another, each of size eps / 2, and their errors add up
        # at worst; float32 sums of up to 40 products are rounded as often again
        roundings = 8 if eps > torch.finfo(torch.float32).eps else 48
        assert (ours[name].double() - value).abs().max() <= roundings * eps / 2 * scale, name


@pytest.mark.parametrize(
    ("variant", "dynamic"), [*((variant, True) for variant in VARIANTS), ("dora_peft", False), ("delora_paper", False)]
)
def test_compile(variant: str, dynamic: bool, seed: int) -> None:
    """LoRA's scale is a symbol too, which torch makes a constant by tracing once more."""
    maker = Maker(seed)
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    arguments = narrow(maker.arguments(variant), torch.float32, torch.float32)

    def call(tensors: dict[str, Tensor], seed: Tensor) -> Tensor:
        rest = {k: v for k, v in arguments.items() if k not in (*tensors, "dropout_mask")}
        y: Tensor = getattr(functional, function_of(variant))(**tensors, **rest, dropout_p=0.25, seed=seed)
        return y.relu()

    compiled = torch.compile(call, backend=counter, fullgraph=True, dynamic=dynamic)
    frames = []
    for T in (5, 9, 13) if dynamic else (5,):
        arguments["x"] = maker.tensor(T, 7).float()
        leaves = leaves_of(arguments)
        mask_seed, grad_out = torch.tensor(T), maker.tensor(T, 6).float()
        with torch._dynamo.config.patch(specialize_float=variant != "lora"):
            ours = gradients(lambda seed=mask_seed, **tensors: compiled(tensors, seed), leaves, grad_out)
        assert_equal(ours, gradients(lambda seed=mask_seed, **tensors: call(tensors, seed), leaves, grad_out))
        frames.append(counter.frame_count)
    assert not dynamic or frames[1] == frames[-1] <= 2  # torch 2.7 compiles once more for the second length


def test_compiled_dropout_is_fresh_each_call(seed: int) -> None:
    torch._dynamo.reset()
    torch.manual_seed(seed)
    arguments = narrow(Maker(seed).arguments("lora", T=40), torch.float32, torch.float32)
    tensors = [arguments[k] for k in ("x", "weight", "A", "B")]
    compiled = torch.compile(
        lambda: functional.lora_linear(*tensors, dropout_p=0.5), backend="aot_eager", fullgraph=True
    )
    assert not torch.equal(compiled(), compiled())


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("variant", VARIANTS)
def test_checkpointing_repeats_the_mask(variant: str, reentrant: bool, seed: int) -> None:
    arguments = Maker(seed).arguments(variant)
    names = list(leaves_of(arguments))
    rest = {k: v for k, v in arguments.items() if k not in (*names, "dropout_mask")}

    def call(*values: Tensor) -> Tensor:
        tensors = dict(zip(names, values, strict=True))
        y: Tensor = getattr(functional, function_of(variant))(**tensors, **rest, dropout_p=0.25)
        return y

    results = []
    for run in (call, lambda *values: checkpoint(call, *values, use_reentrant=reentrant)):
        torch.manual_seed(seed)
        leaves = leaves_of(arguments)
        y = run(*leaves.values())
        y.square().sum().backward()
        results.append({"y": y.detach()} | {k: v.grad for k, v in leaves.items()})
    assert_equal(*results)


@pytest.mark.parametrize("variant", VARIANTS)
def test_autocast_is_the_call_in_autocasts_dtype(variant: str, seed: int) -> None:
    """Under autocast a float32 call computes what the bfloat16 call computes, and gradients come
    back in float32.
    """
    maker = Maker(seed)
    narrowed = narrow(maker.arguments(variant), torch.bfloat16, torch.bfloat16)
    wide = narrow(narrowed, torch.float32, torch.float32)
    grad_out = maker.tensor(5, 6).bfloat16()
    fused, _ = both(variant, wide, 3)
    leaves = leaves_of(wide)
    with torch.autocast("cpu", torch.bfloat16):
        y = fused(**leaves)
    assert y.dtype == torch.bfloat16
    grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), grad_out), strict=True))
    assert all(grad.dtype == torch.float32 for grad in grads.values())
    theirs = gradients(both(variant, narrowed, 3)[0], leaves_of(narrowed), grad_out)
    assert torch.equal(y.float(), theirs.pop("y").float())
    for name, grad in theirs.items():
        assert torch.equal(grads[name].bfloat16(), grad), name


def test_autocast_off_inside_and_float64_untouched(seed: int) -> None:
    arguments = Maker(seed).arguments("lora")
    leaves, fused = leaves_of(arguments), both("lora", arguments, None)[0]
    with torch.autocast("cpu", torch.bfloat16):
        inside = gradients(fused, leaves, torch.ones(5, 6))
    assert_equal(inside, gradients(fused, leaves, torch.ones(5, 6)))


@pytest.mark.parametrize("variant", VARIANTS)
def test_layouts(variant: str, seed: int) -> None:
    """Transposed, strided and expanded tensors and gradients give the bits of their contiguous
    copies.
    """
    maker = Maker(seed)
    arguments = narrow(maker.arguments(variant, T=10), torch.float32, torch.float32)
    strided = {k: v.t().contiguous().t() if isinstance(v, Tensor) and v.dim() == 2 else v for k, v in arguments.items()}
    strided["x"] = torch.stack([arguments["x"], arguments["x"]], dim=-1)[..., 0]
    strided["bias"] = torch.stack([arguments["bias"], arguments["bias"]], dim=-1)[:, 0]
    for grad_out in (maker.tensor(6, 10).t(), maker.tensor(6).expand(10, 6), maker.tensor(10, 12)[:, ::2]):
        fused, _ = both(variant, arguments, 3)
        fused_strided, _ = both(variant, strided, 3)
        leaves = {k: v.detach().requires_grad_() for k, v in strided.items() if k in leaves_of(strided)}
        theirs = gradients(fused, leaves_of(arguments), grad_out.contiguous().float())
        ours = gradients(fused_strided, leaves, grad_out.float())
        for name, value in theirs.items():
            torch.testing.assert_close(ours[name], value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize(("T", "K", "N", "r"), [(0, 4, 3, 2), (1, 1, 1, 1), (3, 0, 4, 2), (3, 4, 0, 2), (2, 17, 5, 7)])
def test_sizes(variant: str, T: int, K: int, N: int, r: int, seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments(variant, T, K, N, r)
    fused, specified = both(variant, arguments, 3)
    grad_out = maker.tensor(T, N)
    ours, theirs = (gradients(f, leaves_of(arguments), grad_out) for f in (fused, specified))
    for name, value in theirs.items():
        assert ours[name].shape == value.shape
        torch.testing.assert_close(ours[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "weight", "bias", "A", "B", "magnitude", "lam"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_not_finite_in_not_finite_out(variant: str, name: str, bad: float, seed: int) -> None:
    """NaN and Inf show in y and in every gradient where they show in the reference."""
    maker = Maker(seed)
    arguments = maker.arguments(variant)
    if not isinstance(arguments.get(name), Tensor):
        return
    arguments[name].view(-1)[0] = bad
    fused, specified = both(variant, arguments, None)
    grad_out = maker.tensor(5, 6)
    ours, theirs = (gradients(f, leaves_of(arguments), grad_out) for f in (fused, specified))
    for key, value in theirs.items():
        assert torch.equal(ours[key].isfinite(), value.isfinite()), key


@pytest.mark.parametrize("variant", VARIANTS)
def test_unwritten_memory_is_never_read(variant: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fresh allocations hold NaN: nothing of it may come out."""
    maker = Maker(seed)
    arguments = narrow(maker.arguments(variant, T=9), torch.bfloat16, torch.float32)
    leaves, grad_out = leaves_of(arguments), maker.tensor(9, 6)
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        results = gradients(both(variant, arguments, 3)[0], leaves, grad_out)
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(value.isfinite().all() for value in results.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_consumers_that_write_in_place(variant: str, seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments(variant)
    fused, specified = both(variant, arguments, 3)
    residual, grad_out = maker.tensor(5, 6), maker.tensor(5, 6)
    ours = gradients(lambda **t: fused(**t).mul_(2).add_(residual).relu_(), leaves_of(arguments), grad_out)
    theirs = gradients(lambda **t: (specified(**t) * 2 + residual).relu(), leaves_of(arguments), grad_out)
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("variant", VARIANTS)
def test_second_derivatives_are_refused(variant: str, seed: int) -> None:
    """Whichever way they are asked for; a gradient with create_graph=True that nobody
    differentiates is fine.
    """
    arguments = Maker(seed).arguments(variant)
    leaves, fused = leaves_of(arguments), both(variant, arguments, None)[0]
    y = fused(**leaves)
    plain = torch.autograd.grad(y.square().sum(), list(leaves.values()), retain_graph=True)
    again = torch.autograd.grad(y.square().sum(), list(leaves.values()), create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))
    for name, grad in zip(leaves, again, strict=True):
        with pytest.raises(RuntimeError, match="has no second derivative"):
            grad.sum().backward(retain_graph=True)
        if name != "bias":
            with pytest.raises(RuntimeError, match="has no second derivative"):
                torch.autograd.grad(grad.square().sum(), leaves["A"], retain_graph=True)
    for second in (torch.autograd.functional.hvp, lambda f, x, v: torch.autograd.functional.hessian(f, x)):
        for name in ("x", "A"):
            with pytest.raises(RuntimeError, match="has no second derivative"):
                second(
                    lambda t, n=name: fused(**{n: t}).square().sum(), arguments[name], torch.ones_like(arguments[name])
                )


@pytest.mark.parametrize("variant", VARIANTS)
def test_batched_gradients(variant: str, seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments(variant)
    leaves = leaves_of(arguments)
    y, many = both(variant, arguments, None)[0](**leaves), maker.tensor(3, 5, 6)
    batched = torch.autograd.grad(y, list(leaves.values()), many, is_grads_batched=True, retain_graph=True)
    for index, grad_out in enumerate(many):
        one = torch.autograd.grad(y, list(leaves.values()), grad_out, retain_graph=True)
        for ours, theirs in zip(batched, one, strict=True):
            torch.testing.assert_close(ours[index], theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_torch_func_is_refused(variant: str, seed: int) -> None:
    arguments = Maker(seed).arguments(variant)
    fused, _ = both(variant, arguments, None)
    with pytest.raises(RuntimeError, match="does not support torch.func transforms; use delora_kernels.reference"):
        torch.func.grad(lambda A: fused(A=A).sum())(arguments["A"])
    with pytest.raises(RuntimeError, match="torch.func"):
        torch.func.vmap(lambda x: fused(x=x))(arguments["x"])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(arguments["x"], arguments["x"])
        with pytest.raises(RuntimeError, match="does not support forward-mode differentiation"):
            fused(x=dual)
        assert fused().shape == (5, 6)


@pytest.mark.parametrize("variant", VARIANTS)
def test_ops_refuse_to_be_differentiated(variant: str, seed: int) -> None:
    x, A = Maker(seed).tensor(3, 4).requires_grad_(), Maker(seed).tensor(2, 4)
    with pytest.raises(RuntimeError, match="no autograd formula of its own"):
        ops.project(x, A, Masks(), "eager")
    with torch.no_grad():
        assert torch.equal(ops.project(x, A, Masks(), "eager"), x @ A.T)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("variant", VARIANTS)
def test_without_gradients_nothing_is_kept(variant: str, mode: Any, seed: int) -> None:
    arguments = Maker(seed).arguments(variant)
    fused, specified = both(variant, arguments, 3)
    with mode():
        y = fused(**leaves_of(arguments))
    assert not y.requires_grad
    torch.testing.assert_close(y.clone(), specified().detach(), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("variant", VARIANTS)
def test_backward_runs_on_the_backend_of_forward(variant: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    for name in ("project", "input_backward"):
        kernel = getattr(eager, name)
        monkeypatch.setattr(eager, name, lambda *args, k=kernel, n=name: calls.append(n) or k(*args))
    arguments = Maker(seed).arguments(variant)
    with use_backend("eager"):
        y = both(variant, arguments, None)[0](**leaves_of(arguments))
    y.sum().backward()
    assert calls == ["project", "input_backward"]


_CHECKED: set[Any] = set()
"""Calls that passed: of a variant's, half are another's in all but the tensors' numbers."""


@pytest.mark.parametrize("variant", VARIANTS)
def test_opcheck(variant: str, seed: int) -> None:
    """Every op call that a forward and backward pass makes passes torch.library.opcheck."""
    arguments = narrow(Maker(seed).arguments(variant), torch.float32, torch.float32)
    seen: dict[str, list[tuple[Any, ...]]] = {}

    class Recorder:
        def __getattr__(self, name: str) -> Any:
            kernel = getattr(eager, name)
            if name not in ops.__dict__:  # what a backend says of itself, no op
                return kernel
            return lambda *args: seen.setdefault(name, []).append((*args, "eager")) or kernel(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ops, "stages", lambda backend, tensors: Recorder())
        for dropout_seed in (None, 3):
            y = both(variant, arguments, dropout_seed)[0](**leaves_of(arguments))
            y.sum().backward()
    assert {"project", "expand", "expand_backward", "input_backward", "weight_grad"} <= set(seen)
    for name, calls in seen.items():
        for args in calls:
            values = (*ops.flat(name, args[:-1]), args[-1])
            detached = tuple(value.detach() if isinstance(value, Tensor) else value for value in values)
            form = (name, *((v.shape, v.stride(), v.dtype) if isinstance(v, Tensor) else v for v in detached))
            if form not in _CHECKED:
                torch.library.opcheck(getattr(torch.ops.delora_kernels, name).default, detached)
                _CHECKED.add(form)
