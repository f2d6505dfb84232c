"""Several active adapters on one layer run fused as one of their summed rank: PEFT's numbers, a
mask for each.
"""

from typing import Any

import pytest
import torch
from peft_models import assert_close, config, model, step
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels import functional as F
from delora_kernels import ops, reference
from delora_kernels.backends import eager
from delora_kernels.op_arguments import Masks

RANKS = (3, 1, 5)
NAMES = ("default", "second", "extra")


def stacked(method: str, seed: int, dropouts: tuple[float, ...] = (0.0, 0.0, 0.0), **options: Any) -> Any:
    """A model with three active adapters of different rank and scale on its first two layers, one
    on the third.
    """
    made = model(method, seed, dropout_p=dropouts[0], **options)
    torch.manual_seed(seed + 1)
    targets = {"target_modules": ["first", "second"]}
    for name, r, p in zip(NAMES[1:], RANKS[1:], dropouts[1:], strict=True):
        made.add_adapter(name, config(method, r=r, dropout_p=p, **targets))
    made.base_model.set_adapter(list(NAMES))
    return made


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 12)


@pytest.mark.parametrize("method", ["lora", "rslora", "delora"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_parity(method: str, dtype: torch.dtype, x: Tensor, seed: int) -> None:
    """Outputs and every gradient, among them those of each adapter; float32 adapters on a bfloat16
    base.
    """
    made = stacked(method, seed, dtype=dtype)
    theirs = step(made, x.to(dtype))
    factors = ("lora_A", "lora_B", "delora_A", "delora_B", "delora_lambda")
    assert {name.partition(factor)[2] for name in theirs for factor in factors if factor in name} >= {
        f".{name}.weight" if method != "delora" else f".{name}" for name in NAMES
    }
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == 3
    assert_close(step(made, x.to(dtype)), theirs, dtype)


@pytest.mark.parametrize("factors", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("method", ["lora", "delora"])
def test_autocast(method: str, factors: torch.dtype, x: Tensor, seed: int) -> None:
    """Also of factors in the half precision that is not autocast's."""
    made = stacked(method, seed)
    for name, tensor in (*made.named_parameters(), *made.named_buffers()):
        if method in name and "base_layer" not in name:
            tensor.data = tensor.data.to(factors)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs, torch.bfloat16)


def test_factors_of_different_dtypes(x: Tensor, seed: int) -> None:
    """One adapter in float32, the others in bfloat16: as wide as the widest, with gradients in each
    one's own dtype.
    """
    made = stacked("lora", seed, dtype=torch.bfloat16)
    for name, parameter in made.named_parameters():
        if "second." in name or "extra" in name:
            parameter.data = parameter.data.bfloat16()
    theirs = step(made, x.bfloat16())
    dk.accelerate(made, strict=True)
    assert_close(step(made, x.bfloat16()), theirs, torch.bfloat16)


def test_scales_and_switching(x: Tensor, seed: int) -> None:
    """Scales changed later, also to 0 and below; adapters taken out of the active ones and back."""
    made = stacked("lora", seed, dtype=torch.float64)
    x = x.double()
    dk.accelerate(made, strict=True)
    layer = made.base_model.model.first
    for scales in ((-2.0, 1.0, 0.5), (0.0, 3.0, 0.0), (0.0, 0.0, 0.0)):
        for name, scale in zip(NAMES, scales, strict=True):
            layer.set_scale(name, scale)
        ours = step(made, x)
        dk.restore(made)
        assert_close(
            {"y": ours["y"], "x": ours["x"]}, {k: v for k, v in step(made, x).items() if k in ("y", "x")}, x.dtype
        )
        dk.accelerate(made)
    for active in (["second"], ["extra", "default"], [], list(NAMES)):
        made.base_model.set_adapter(active)
        y = made(x)
        dk.restore(made)
        torch.testing.assert_close(y, made(x))
        dk.accelerate(made)


class _Recorder:
    """The seeds of the masks that calls draw."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seeds: list[Tensor] = []
        real = eager.project

        def project(x: Tensor, A_hat: Tensor, masks: Masks) -> Tensor:
            self.seeds.append(masks.seed)
            return real(x, A_hat, masks)

        monkeypatch.setattr(eager, "project", project)


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_each_adapter_drops_its_own(method: str, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the masks of the seeds that were drawn, the layer is the sum of its adapters on their
    own dropped inputs.
    """
    p = (0.25, 0.0, 0.5)
    made = stacked(method, seed, p, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    layer, x = made.base_model.model.first, x.double().requires_grad_()
    recorder = _Recorder(monkeypatch)
    y = layer(x)
    dy = torch.randn_like(y)
    trained = [q for n, q in layer.named_parameters() if "base" not in n]
    got = torch.autograd.grad(y, [x, *trained], dy)

    (seeds,) = recorder.seeds
    masks = [ops.dropout_mask(10, 12, q, one, "eager") for q, one in zip(p, seeds, strict=True)]
    assert len({tuple(mask.flatten().tolist()) for mask in masks}) == 3
    expected = layer.base_layer(x)
    for name, mask, q in zip(NAMES, masks, p, strict=True):
        dropped = x * mask.view_as(x) / (1 - q)
        if method == "lora":
            A, B = layer.lora_A[name].weight, layer.lora_B[name].weight
            expected = expected + layer.scaling[name] * (dropped @ A.T) @ B.T
        else:
            A, B, lam = (getattr(layer, f"delora_{part}")[name] for part in ("A", "B", "lambda"))
            nothing = torch.zeros_like(layer.base_layer.weight)
            expected = expected + reference.delora_linear(dropped, nothing, A, B, lam, layer.delora_w_norm[name])
    theirs = torch.autograd.grad(expected, [x, *trained], dy)
    torch.testing.assert_close(y, expected)
    for ours, gradient in zip(got, theirs, strict=True):
        torch.testing.assert_close(ours, gradient)


def test_compiles(x: Tensor, seed: int) -> None:
    for method in ("lora", "delora"):
        torch._dynamo.reset()
        layer = stacked(method, seed).base_model.model.first
        dk.accelerate(layer, strict=True)
        theirs = step(layer, x)
        ours = step(torch.compile(layer, backend="aot_eager", fullgraph=True), x)
        assert_close({name.removeprefix("_orig_mod."): value for name, value in ours.items()}, theirs)


@pytest.mark.parametrize("bfloat16", [False, True])
@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_dora_among_them(order: tuple[str, str], bfloat16: bool, x: Tensor, seed: int) -> None:
    """PEFT's DoRA rescales what the adapters before it gave: their order counts."""
    dtype = torch.bfloat16 if bfloat16 else torch.float64
    made = model("lora", seed, dtype=dtype)
    made.add_adapter("second", config("dora", target_modules=["first"]))
    made.base_model.set_adapter(list(order))
    theirs = step(made, x.to(dtype))
    dk.accelerate(made, strict=True)
    assert_close(step(made, x.to(dtype)), theirs, dtype)


@pytest.mark.parametrize("order", [("default", "second"), ("second", "default")])
def test_a_dora_among_them_that_drops(order: tuple[str, str], x: Tensor, seed: int) -> None:
    """PEFT's masks, and what PEFT makes of them: the base once more, on what is left of its input,
    which the adapters before it have no part in.
    """
    made = model("lora", seed, dropout_p=0.3, dtype=torch.float64)
    made.add_adapter("second", config("dora", dropout_p=0.5, target_modules=["first"]))
    made.base_model.set_adapter(list(order))
    magnitude = made.base_model.model.first.lora_magnitude_vector["second"].weight
    magnitude.data *= 0.5 + torch.rand_like(magnitude)
    theirs = step(made.base_model.model.first, x.double(), seed)
    dk.accelerate(made, strict=True)
    assert_close(step(made.base_model.model.first, x.double(), seed), theirs, torch.float64)


def test_delora_factors(seed: int) -> None:
    """The pair is the update: its product is the reference's, with every gradient; the clamp stops
    its gradients.
    """
    torch.manual_seed(seed)
    A, B = torch.randn(4, 7, dtype=torch.float64), torch.randn(5, 4, dtype=torch.float64)
    A[1] *= 1e-6
    lam, norm = torch.tensor([1.7], dtype=torch.float64), torch.rand(7, dtype=torch.float64)
    leaves = [value.requires_grad_() for value in (A, B, lam)]
    A_hat, B_hat = F.delora_factors(A, B, lam, norm)
    expected = reference.delora_weight(torch.zeros(5, 7, dtype=torch.float64), A, B, lam, norm)
    upstream = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(B_hat @ A_hat, expected)
    ours = torch.autograd.grad(B_hat @ A_hat, leaves, upstream)
    for got, want in zip(ours, torch.autograd.grad(expected, leaves, upstream), strict=True):
        torch.testing.assert_close(got, want)
    with torch.no_grad():
        narrow = F.delora_factors(A.bfloat16(), B.bfloat16(), 2.0, 1.0)
    assert [value.dtype for value in narrow] == [torch.bfloat16] * 2


@pytest.mark.parametrize(
    ("change", "kind", "text"),
    [
        ({"ranks": [2, 2]}, ValueError, "ranks must be positive and sum to A's 3 rows, got [2, 2]"),
        ({"ranks": [3, 0]}, ValueError, "ranks must be positive and sum to A's 3 rows, got [3, 0]"),
        ({"ranks": 3}, TypeError, "ranks must be a list of ints, or None, got 3"),
        ({"ranks": [1.0, 2.0]}, TypeError, "ranks must be a list of ints, or None"),
        (
            {"ranks": [1, 2], "dropout_p": [0.1]},
            ValueError,
            "dropout_p must be 2 numbers, one for each of ranks, got 1",
        ),
        ({"dropout_p": [0.1, 0.2]}, ValueError, "dropout_p must be one number where ranks is None, got 2 numbers"),
        ({"ranks": [1, 2], "dropout_p": [0.1, 1.0]}, ValueError, "dropout_p must be in [0, 1), got 1.0"),
    ],
)
def test_errors(change: dict[str, Any], kind: type[Exception], text: str) -> None:
    arguments = {"x": torch.zeros(2, 4), "weight": torch.zeros(5, 4), "A": torch.zeros(3, 4), "B": torch.zeros(5, 3)}
    with pytest.raises(kind, match="lora_linear: ") as caught:
        F.lora_linear(**arguments, **change)
    assert text in str(caught.value)


def test_errors_of_delora_factors() -> None:
    A, B = torch.zeros(3, 4), torch.zeros(5, 3)
    for bad, text in (
        ((A, torch.zeros(5, 2), 1.0, 1.0), "delora_factors: B must be [N, r] = [5, 3], got [5, 2]"),
        ((A, B, torch.zeros(2), 1.0), "delora_factors: lam must be a number, 0-d or [1]"),
        ((A, B, 1.0, torch.zeros(3)), "delora_factors: weight_norm must be [K] = [4], got [3]"),
    ):
        with pytest.raises(ValueError, match="delora_factors") as caught:
            F.delora_factors(*bad)  # type: ignore[arg-type]
        assert text in str(caught.value)


def test_nothing_is_stacked_where_one_is_active(seed: int) -> None:
    """An adapter that a layer does not have does not count."""
    made = stacked("lora", seed)
    dk.accelerate(made, strict=True)
    third = made.base_model.model.third
    assert isinstance(third.base_layer, nn.Linear)
    assert list(third.lora_A) == ["default"]
    x = torch.ones(2, 14)
    expected = third.base_layer(x) + third.scaling["default"] * third.lora_B["default"](third.lora_A["default"](x))
    torch.testing.assert_close(third(x), expected)


def test_second_derivatives_raise(x: Tensor, seed: int) -> None:
    """They are never dropped: neither by the folded factors alone nor by stacked layers."""
    A, B = torch.randn(2, 4, dtype=torch.float64, requires_grad=True), torch.randn(3, 2, dtype=torch.float64)
    A_hat, _ = F.delora_factors(A, B, 1.5, 1.0)
    (gradient,) = torch.autograd.grad(A_hat.sum(), A, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative"):
        (gradient.square().sum() + A.sum()).backward()
    for method in ("lora", "delora"):
        made = stacked(method, seed)
        dk.accelerate(made, strict=True)
        trained = [p for p in made.parameters() if p.requires_grad]
        gradients = torch.autograd.grad(made(x).square().sum(), trained, create_graph=True)
        with pytest.raises(RuntimeError, match="has no second derivative"):
            torch.autograd.grad(sum(g.sum() for g in gradients), trained, allow_unused=True)


def test_small_scales_beside_large_ones_in_half_precision(seed: int) -> None:
    """A small adapter's factors don't sink below float16's normal numbers: its part is as exact as
    PEFT's.
    """
    made = model("lora", seed, dtype=torch.float16)
    made.add_adapter("second", config("lora", target_modules=["first"]))
    made.base_model.set_adapter(["default", "second"])
    layer = made.base_model.model.first.half()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        layer.base_layer.weight.zero_()
        layer.base_layer.bias.zero_()
        layer.lora_B["default"].weight.copy_(1e-3 * torch.randn(20, 3, generator=generator))
        layer.lora_B["second"].weight.zero_()
    layer.scaling.update(default=0.125, second=64.0)
    x = torch.randn(6, 12, generator=generator).half()
    exact = 0.125 * x.double() @ layer.lora_A["default"].weight.double().T @ layer.lora_B["default"].weight.double().T
    theirs = layer(x)
    dk.accelerate(layer, strict=True)
    ours = layer(x)
    errors = [(y.double() - exact).norm() / exact.norm() for y in (ours, theirs)]
    assert errors[0] <= 2 * errors[1] + torch.finfo(torch.float16).eps


def test_compiles_with_scales_that_change(x: Tensor, seed: int) -> None:
    for dynamic in (None, True):
        torch._dynamo.reset()
        layer = stacked("lora", seed, dtype=torch.float64).base_model.model.first
        dk.accelerate(layer, strict=True)
        compiled = torch.compile(layer, backend="eager", fullgraph=True, dynamic=dynamic)
        for scale in (1.5, 3.0, 0.25, -1.0):
            layer.set_scale("default", scale)
            torch.testing.assert_close(compiled(x.double()), layer(x.double()))
