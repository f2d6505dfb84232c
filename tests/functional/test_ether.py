"""The fused ETHER functions: the authors' vectors, float64, every subset of gradients, and life
inside PyTorch.
"""

import itertools
from typing import Any

import pytest
import torch
import torch._dynamo.testing
from ether_calls import ether_arguments
from ether_cases import EtherCase, ether_cases, ether_errors
from golden_cases import relative_error
from hypothesis import given, settings
from hypothesis import strategies as st
from reference_calls import Maker
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from benchmarks.memory import kept_bytes
from delora_kernels import functional as F
from delora_kernels import ops, reference

VARIANTS = list(itertools.product((False, True), [("into",), ("out_of",), ("into", "out_of")]))
FUSED = [case for case in ether_cases() if "qkv" not in case.name]


def name_of(plus: bool) -> str:
    return "ether_plus_linear" if plus else "ether_linear"


def results(function: Any, arguments: dict[str, Any], trained: Any, grad_out: Tensor) -> dict[str, Tensor]:
    """y, and the gradients of the named tensors."""
    leaves = {name: arguments[name].detach().clone().requires_grad_() for name in trained}
    y = function(**arguments | leaves)
    y.backward(grad_out.to(y.dtype))
    return {"y": y.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def tensors_of(arguments: dict[str, Any]) -> list[str]:
    return [name for name, value in arguments.items() if isinstance(value, Tensor)]


def cast(arguments: dict[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    return {name: value.to(dtype) if isinstance(value, Tensor) else value for name, value in arguments.items()}


@pytest.mark.parametrize("case", FUSED, ids=str)
def test_golden(case: EtherCase) -> None:
    errors = ether_errors(getattr(F, case.function), case)
    assert {name: error for name, error in errors.items() if not error <= 1e-12} == {}


@pytest.mark.parametrize("blocks", ["paper", "official"])
@pytest.mark.parametrize("plus", [False, True])
@settings(max_examples=30, deadline=None)
@given(data=st.data())
def test_float64(plus: bool, blocks: str, data: st.DataObject) -> None:
    """Every shape, every side, every subset of requires_grad: what the reference gives."""
    maker = Maker(data.draw(st.integers(0, 2**31 - 1), label="seed"))
    n, k, m = data.draw(st.tuples(*[st.integers(1, 4)] * 3), label="blocks, K / blocks, N / blocks")
    sides = data.draw(st.sampled_from([side for _, side in VARIANTS[:3]]), label="sides")
    lead = data.draw(st.lists(st.integers(0, 3), max_size=3), label="leading dimensions of x")
    arguments = ether_arguments(maker, plus, sides, torch.Size(lead).numel(), n * k, n * m, n)
    arguments |= {"x": arguments["x"].reshape(*lead, n * k), "blocks": blocks}
    if data.draw(st.booleans(), label="no bias"):
        del arguments["bias"]
    trained = data.draw(st.sets(st.sampled_from(tensors_of(arguments)), min_size=1), label="trained")
    grad_out = maker.tensor(*lead, n * m)
    ours, want = (results(getattr(of, name_of(plus)), arguments, sorted(trained), grad_out) for of in (F, reference))
    for name in want:
        assert ours[name].shape == want[name].shape
        if want[name].numel():  # the gradients of one-element blocks vanish by cancellation: hence a floor
            error = float((ours[name] - want[name]).abs().max() / want[name].abs().max().clamp(min=1.0))
            assert error <= 1e-12, f"{name}: {error}"


@pytest.mark.parametrize(("plus", "sides"), VARIANTS)
def test_gradients_lie_across_their_vectors(plus: bool, sides: tuple[str, ...], seed: int) -> None:
    arguments = ether_arguments(Maker(seed), plus, sides, 5, 12, 8)
    names = [name for name in arguments if name[0] in "uv"]
    found = results(getattr(F, name_of(plus)), arguments, names, Maker(seed + 1).tensor(5, 8))
    for name in names:
        along = (found[name] * arguments[name]).sum(1).abs().max()
        assert along <= 1e-13 * (found[name].norm() * arguments[name].norm())


@pytest.mark.parametrize("plus", [False, True])
def test_vectors_of_length_zero(plus: bool, seed: int) -> None:
    """The identity and no gradient where a vector has no direction; the others go on as they
    are.
    """
    arguments = ether_arguments(Maker(seed), plus, ("into", "out_of"), 5, 12, 8)
    for name in [name for name in arguments if name[0] in "uv"]:
        arguments[name][0] = 0
    names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(5, 8)
    ours, want = (results(getattr(of, name_of(plus)), arguments, names, grad_out) for of in (F, reference))
    assert {name: error for name in want if not (error := relative_error(ours[name], want[name])) <= 1e-12} == {}
    assert all(not ours[name][0].any() for name in names if name[0] in "uv")
    assert all(ours[name][1].any() for name in names if name[0] in "uv")


def test_non_finite_values_stay_in_their_blocks(seed: int) -> None:
    arguments = cast(ether_arguments(Maker(seed), True, ("into",), 5, 12, 8), torch.float32)
    x = arguments["x"]
    x[1, 3], x[2, 8] = torch.nan, torch.inf
    y = ops.reflect(x, arguments["u"], arguments["v"], None, "eager")
    finite = y.isfinite()
    assert finite[[0, 3, 4]].all()
    assert finite[1, 6:].all()
    assert finite[2, :6].all()
    assert not finite[1, :6].any()
    assert not finite[2, 6:].any()


@pytest.mark.parametrize(("plus", "sides"), [VARIANTS[0], VARIANTS[1], VARIANTS[5]])
def test_compile(plus: bool, sides: tuple[str, ...], seed: int) -> None:
    """One graph, forward and backward, for any number of tokens; the same bits."""
    torch._dynamo.reset()
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    function = getattr(F, name_of(plus))
    compiled = torch.compile(lambda **given: function(**given).relu(), backend=counter, fullgraph=True, dynamic=True)
    frames = []
    for T in (8, 11, 13):
        arguments = cast(ether_arguments(Maker(seed), plus, sides, T, 12, 8), torch.float32)
        names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(T, 8)
        ours = results(compiled, arguments, names, grad_out)
        want = results(lambda **given: function(**given).relu(), arguments, names, grad_out)
        assert [name for name in want if not torch.equal(ours[name], want[name])] == []
        frames.append(counter.frame_count)
    assert frames[1] == frames[-1] <= 2


def test_compiled_official_blocks(seed: int) -> None:
    arguments = cast(ether_arguments(Maker(seed), True, ("into", "out_of"), 8, 12, 8), torch.float32)
    arguments["blocks"] = "official"
    names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(8, 8)
    torch._dynamo.reset()
    compiled = torch.compile(F.ether_plus_linear, backend="aot_eager", fullgraph=True)
    ours, want = (results(f, arguments, names, grad_out) for f in (compiled, F.ether_plus_linear))
    assert all(relative_error(ours[name], want[name]) <= 1e-6 for name in want)


@pytest.mark.parametrize("plus", [False, True])
def test_autocast(plus: bool, seed: int) -> None:
    """x and W are cast as nn.Linear casts them, the vectors stay float32; gradients in their
    tensors' dtypes.
    """
    arguments = cast(ether_arguments(Maker(seed), plus, ("into", "out_of"), 16, 12, 8), torch.float32)
    arguments["bias"] = arguments["bias"].bfloat16().float()  # or by_hand would round it once more
    names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(16, 8)
    function = getattr(F, name_of(plus))
    with torch.autocast("cpu", torch.bfloat16):
        under = results(function, arguments, names, grad_out)
    narrow = {k: v.bfloat16() if k in ("x", "weight", "bias") else v for k, v in arguments.items()}
    by_hand = results(function, narrow, names, grad_out)
    assert under["y"].dtype == torch.bfloat16
    for name, value in by_hand.items():
        assert name == "y" or under[name].dtype == torch.float32
        assert torch.equal(under[name].to(value.dtype), value), name
    exact = results(getattr(reference, name_of(plus)), cast(arguments, torch.float64), names, grad_out)
    assert all(relative_error(under[name], exact[name]) <= 0.05 for name in exact)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, seed: int) -> None:
    arguments = ether_arguments(Maker(seed), True, ("into", "out_of"), 5, 12, 8)
    names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(5, 8)

    def checkpointed(**given: Any) -> Any:
        return checkpoint(
            lambda *values: F.ether_plus_linear(**dict(zip(given, values, strict=True))),
            *given.values(),
            use_reentrant=reentrant,
        )

    ours, want = (results(f, arguments, names, grad_out) for f in (checkpointed, F.ether_plus_linear))
    assert [name for name in want if not torch.equal(ours[name], want[name])] == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bits_repeat_and_layouts_do_not_matter(dtype: torch.dtype, seed: int) -> None:
    arguments = cast(ether_arguments(Maker(seed), True, ("into", "out_of"), 64, 48, 40), dtype)
    names, grad_out = tensors_of(arguments), Maker(seed + 1).tensor(64, 40)
    want = results(F.ether_plus_linear, arguments, names, grad_out)
    strided = arguments | {"x": arguments["x"].t().contiguous().t(), "u": arguments["u"].t().contiguous().t()}
    for laid_out, entering in ((arguments, grad_out), (strided, grad_out.t().contiguous().t())):
        leaves = {name: laid_out[name].detach().requires_grad_() for name in names}
        y = F.ether_plus_linear(**leaves)
        grads = torch.autograd.grad(y, list(leaves.values()), entering.to(dtype))
        for name, value in zip(("y", *leaves), (y, *grads), strict=True):
            same = torch.equal(value, want[name])
            assert same or (laid_out is strided and relative_error(value, want[name]) <= torch.finfo(dtype).eps * 8), (
                name
            )


@pytest.mark.parametrize(("plus", "sides"), VARIANTS)
def test_kept_for_backward(plus: bool, sides: tuple[str, ...]) -> None:
    """Nothing beyond x and the parameters but, with output vectors, one [T, N] tensor."""
    T, K, N = 64, 128, 96
    arguments = cast(ether_arguments(Maker(0), plus, sides, T, K, N), torch.float32)
    leaves = {name: arguments[name].requires_grad_(name != "weight") for name in arguments}
    kept = kept_bytes(lambda: getattr(F, name_of(plus))(**leaves), tuple(leaves.values()))
    assert kept == (4 * T * N if "out_of" in sides else 0)


def test_second_derivatives_and_transforms_are_refused(seed: int) -> None:
    arguments = ether_arguments(Maker(seed), False, ("into",), 5, 12, 8)
    u = arguments["u"].requires_grad_()
    (du,) = torch.autograd.grad(F.ether_linear(**arguments).sum(), u, create_graph=True)
    with pytest.raises(RuntimeError, match="ether_linear has no second derivative: .*reference.ether_linear"):
        torch.autograd.grad(du.sum(), u)
    rest = {name: value for name, value in arguments.items() if name != "u"}
    with pytest.raises(RuntimeError, match="ether_linear does not support torch.func transforms"):
        torch.func.grad(lambda u: F.ether_linear(u=u, **rest).sum())(u.detach())
