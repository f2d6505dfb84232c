"""EtherLinear and EtherPlusLinear: starts, what they compute, merging, saving."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from delora_kernels import reference
from delora_kernels.nn import EtherLinear, EtherPlusLinear
from delora_kernels.testing import relative_error

DTYPES = (torch.float64, torch.float32, torch.bfloat16)
KINDS = [
    (cls, side, blocks)
    for cls in (EtherLinear, EtherPlusLinear)
    for side in ("input", "output", "both")
    for blocks in ("paper", "official")
    if (side, blocks) != ("output", "official")  # has no input side
]
every_kind = pytest.mark.parametrize(("cls", "side", "blocks"), KINDS)


def make(cls: Any, side: str, blocks: str = "paper", dtype: torch.dtype = torch.float64, **options: Any) -> Any:
    """A module whose vectors have left their start."""
    module = cls.from_linear(nn.Linear(12, 8).to(dtype), 2, side=side, blocks=blocks, **options)
    for vectors in module._vectors().values():
        vectors.data += 0.3 * torch.randn_like(vectors)
    return module


def exact_weight(module: Any) -> Tensor:
    """W' by the reference, in float64."""
    vectors = {name: value.detach().double() for name, value in module._vectors().items()}
    weight = reference.ether_weight if isinstance(module, EtherLinear) else reference.ether_plus_weight
    adapted: Tensor = weight(module.weight.double(), **vectors, blocks=module.blocks)
    return adapted


@every_kind
def test_forward_and_gradients(cls: Any, side: str, blocks: str) -> None:
    module, x, grad_out = make(cls, side, blocks), torch.randn(2, 5, 12).double(), torch.randn(2, 5, 8).double()
    leaves = {name: p.detach().clone().requires_grad_() for name, p in module._vectors().items()}
    function = reference.ether_linear if cls is EtherLinear else reference.ether_plus_linear
    want = function(x, module.weight, bias=module.bias, blocks=blocks, **leaves)
    y = module(x)
    assert relative_error(y, want) <= 1e-13
    y.backward(grad_out)
    want.backward(grad_out)
    for name, leaf in leaves.items():
        assert leaf.grad is not None
        assert relative_error(getattr(module, name).grad, leaf.grad) <= 1e-12
    assert module.weight.grad is None
    assert module.bias.grad is None
    sides = {"input": ("",), "output": ("_out",), "both": ("", "_out")}[side]
    letters = ("u",) if cls is EtherLinear else ("u", "v")
    trained = {name for name, p in module.named_parameters() if p.requires_grad}
    assert trained == {letter + suffix for letter in letters for suffix in sides}


@pytest.mark.parametrize("side", ["input", "output", "both"])
def test_starts(side: str) -> None:
    """ETHER's is at distance 2 a block from the frozen layer, ETHER+'s is the frozen layer; both
    Kaiming uniform.
    """
    eye = nn.Linear(60, 60, bias=False).double()
    with torch.no_grad():
        eye.weight.copy_(torch.eye(60))
    module = EtherLinear.from_linear(eye, 3, side=side)
    H = exact_weight(module)
    if side != "both":
        for s in (slice(0, 20), slice(20, 40), slice(40, 60)):
            assert float((H[s, s] - torch.eye(20)).norm()) == pytest.approx(2, abs=1e-12)
    assert (H @ H.T - torch.eye(60)).abs().max() <= 1e-12
    plus = EtherPlusLinear.from_linear(eye, 3, side=side)
    assert (plus(torch.eye(60).double()) - torch.eye(60)).abs().max() <= 1e-14
    for made in (module, plus):
        for vectors in made._vectors().values():
            assert vectors.shape == (3, 20)
            assert vectors.abs().max() <= 20**-0.5
            assert float(vectors.detach().std()) == pytest.approx(20**-0.5 / 3**0.5, rel=0.4)
            assert not torch.equal(vectors[0], vectors[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@every_kind
def test_merge(cls: Any, side: str, blocks: str, dtype: torch.dtype) -> None:
    module = make(cls, side, blocks, dtype)
    assert module._vectors()["u_out" if side == "output" else "u"].dtype == torch.promote_types(dtype, torch.float32)
    x, before, adapted = torch.randn(6, 12, dtype=dtype), module.weight, exact_weight(module)
    y, bits, eps = module(x), module.weight.clone(), torch.finfo(dtype).eps
    module.merge()
    assert module.weight.dtype == dtype
    error = (module.weight.double() - adapted).abs()
    arithmetic = 8 * torch.finfo(torch.promote_types(dtype, torch.float32)).eps * adapted.abs().max()
    assert (error <= adapted.abs() * eps / 2 + arithmetic).all()  # rounded once
    assert relative_error(module(x), y) <= 16 * eps
    module.unmerge()
    assert module.weight is before
    assert torch.equal(module.weight, bits)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("side", "blocks"), [(side, blocks) for cls, side, blocks in KINDS if cls is EtherLinear])
def test_ether_unmerges_by_reflecting_again(side: str, blocks: str, dtype: torch.dtype) -> None:
    module = make(EtherLinear, side, blocks, dtype)
    W = module.weight.clone()
    module.merge(keep_weight=False)
    assert module.base_weight.numel() == 0
    module.unmerge()
    assert not module.merged
    assert not module.weight.requires_grad
    assert relative_error(module.weight, W) <= 16 * torch.finfo(dtype).eps


def test_ether_plus_needs_its_weight() -> None:
    module = make(EtherPlusLinear, "both")
    module.merge(keep_weight=False)
    with pytest.raises(RuntimeError, match="EtherPlusLinear.unmerge: .*let the weight go"):
        module.unmerge()


@pytest.mark.parametrize("merged", [False, True])
@every_kind
def test_state_dict(cls: Any, side: str, blocks: str, merged: bool) -> None:
    module = make(cls, side, blocks)
    x = torch.randn(3, 12).double()
    if merged:
        module.merge()
    other = cls(12, 8, 2, side=side, blocks=blocks, dtype=torch.float64)
    other.load_state_dict(module.state_dict())
    assert other.merged == merged
    assert torch.equal(other(x), module(x))
    assert torch.equal(copy.deepcopy(module)(x), module(x))


def test_dropout_is_of_the_whole_layer() -> None:
    module = make(EtherLinear, "input", dropout_p=0.5)
    x = torch.randn(4, 12).double()
    torch.manual_seed(3)
    y = module(x)
    torch.manual_seed(3)
    assert torch.equal(y, module.eval()(nn.functional.dropout(x, 0.5)))


def test_mixed_dtypes_and_repr() -> None:
    module = EtherPlusLinear.from_linear(nn.Linear(12, 8).bfloat16(), 4, side="input")
    y = module(torch.randn(3, 12).bfloat16())
    y.sum().backward()
    assert (y.dtype, module.u.dtype, module.u.grad.dtype) == (torch.bfloat16, torch.float32, torch.float32)
    assert "in_features=12, out_features=8, bias=True, dropout_p=0.0, n_blocks=4, side='input'" in repr(module)


@pytest.mark.parametrize(
    ("options", "kind", "text"),
    [
        ({"n_blocks": 5}, ValueError, "EtherLinear: n_blocks must be a divisor of in_features = 12, got 5"),
        ({"n_blocks": 3, "side": "both"}, ValueError, "n_blocks must be a divisor of out_features = 8, got 3"),
        ({"n_blocks": 0}, ValueError, "n_blocks must be a divisor"),
        ({"n_blocks": 2.0}, TypeError, "n_blocks must be an int, got float"),
        ({"side": "left"}, ValueError, "side must be one of ('input', 'output', 'both'), got 'left'"),
        ({"blocks": "rows"}, ValueError, "blocks must be one of ('paper', 'official'), got 'rows'"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p must be in [0, 1)"),
    ],
)
def test_bad_options(options: dict[str, Any], kind: type[Exception], text: str) -> None:
    with pytest.raises(kind) as caught:
        EtherLinear(12, 8, **options)
    assert text in str(caught.value)
