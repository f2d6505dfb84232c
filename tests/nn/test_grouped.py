"""GroupedLoRALinear and its kin: starts, numbers against the reference, merging, state dicts, what
construction refuses.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import ops, reference
from delora_kernels.nn import GroupedDeLoRALinear, GroupedDoRALinear, GroupedLoRALinear
from delora_kernels.testing import relative_error

E, K, N = 3, 14, 10
KINDS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "lora": (GroupedLoRALinear, {"alpha": 3.0}, set()),
    "rslora": (GroupedLoRALinear, {"alpha": 3.0, "rslora": True}, set()),
    "dora": (GroupedDoRALinear, {"alpha": 3.0}, {"magnitude"}),
    "delora": (GroupedDeLoRALinear, {"lam": 2.0}, {"lam"}),
}
OFFSETS = torch.tensor([4, 4, 9])
every_kind = pytest.mark.parametrize("kind", KINDS)


def make(kind: str, dtype: torch.dtype = torch.float64, trained: bool = True, **options: Any) -> Any:
    cls, own, _ = KINDS[kind]
    weight, bias = torch.randn(E, K, N, dtype=dtype).mT / math.sqrt(K), torch.randn(E, N, dtype=dtype)
    module = cls.from_weight(weight, bias, 3, **own | options)
    if trained:
        for parameter in (p for p in module.parameters() if p.requires_grad):
            parameter.data += 0.3 * torch.randn_like(parameter)
    return module


def expected(module: Any, x: Tensor, mask: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """y by the reference, and the leaves that it is made of."""
    values = {name: value.detach().double() for name, value in module.state_dict().items()}
    leaves = {n: v.requires_grad_() for n, v in values.items() if n in ("A", "B", "magnitude", "lam")}
    name = {"GroupedLoRALinear": "lora", "GroupedDoRALinear": "dora", "GroupedDeLoRALinear": "delora"}
    rest = {} if "lam" in values else {"scale": 3.0 / (math.sqrt(3) if module.rslora else 3)}
    function = getattr(reference, f"grouped_{name[type(module).__name__]}_linear")
    return function(x.double(), offsets=OFFSETS, dropout_mask=mask, **values, **rest), leaves


def frozen(module: Any, x: Tensor) -> Tensor:
    A, B = (torch.zeros_like(each, dtype=x.dtype) for each in (module.A, module.B))
    return reference.grouped_lora_linear(x, module.weight, A, B, OFFSETS, 1.0, module.bias)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@every_kind
def test_start_is_the_frozen_linears(kind: str, dtype: torch.dtype) -> None:
    module, x = make(kind, dtype, trained=False), torch.randn(11, K, dtype=dtype)
    y = module(x, OFFSETS)
    assert y.dtype == dtype
    assert relative_error(y, frozen(module, x)) <= 20 * torch.finfo(dtype).eps
    assert not y[9:].any()
    assert module.A.dtype == (torch.float32 if dtype == torch.bfloat16 else dtype)
    assert module.A.abs().max() <= 1 / math.sqrt(K)
    assert module.A.std() > 0.5 / math.sqrt(3 * K)


@every_kind
def test_output_and_gradients_are_the_references(kind: str) -> None:
    module = make(kind)
    x = torch.randn(11, K, dtype=torch.float64, requires_grad=True)
    y, leaves = expected(module, x)
    grad_out = torch.randn_like(y)
    (got := module(x, OFFSETS)).backward(grad_out)
    assert relative_error(got, y) <= 1e-13
    found = {name: p.grad for name, p in module.named_parameters() if p.requires_grad}
    assert found.keys() == leaves.keys() == {"A", "B"} | KINDS[kind][2]
    for name, want in zip(leaves, torch.autograd.grad(y, [*leaves.values()], grad_out), strict=True):
        assert (found[name] - want).abs().max() <= 1e-12 * want.abs().max().clamp(min=1), name
    assert module.weight.grad is None


@every_kind
def test_dropout_in_training_only(kind: str) -> None:
    module, x = make(kind, dropout_p=0.25), torch.randn(11, K, dtype=torch.float64)
    state = torch.get_rng_state()
    y = module(x, OFFSETS)
    torch.set_rng_state(state)
    seed = torch.randint(-(1 << 63), (1 << 63) - 1, (), dtype=torch.int64)  # as the functions draw it
    mask = ops.dropout_mask(11, K, 0.25, seed, "eager").double() / 0.75
    assert relative_error(y, expected(module, x, mask)[0]) <= 1e-13
    without = expected(module, x)[0]
    assert relative_error(y, without) > 1e-3
    assert relative_error(module.eval()(x, OFFSETS), without) <= 1e-13


@every_kind
def test_merge_unmerge_and_state_dict(kind: str) -> None:
    """Merged: the bare linears of W'; W comes back with every bit; a state dict goes into another
    module, merged or not.
    """
    module, x = make(kind), torch.randn(11, K, dtype=torch.float64)
    weight, y = module.weight, module(x, OFFSETS)
    before = weight.clone()
    module.merge()
    assert relative_error(module(x, OFFSETS), y) <= 1e-13
    assert "merged=True" in repr(module)
    other = make(kind, trained=False)
    other.load_state_dict(module.state_dict())
    assert other.merged
    assert torch.equal(other(x, OFFSETS), module(x, OFFSETS))
    with pytest.raises(RuntimeError, match="merged already"):
        module.merge()
    module.unmerge()
    assert module.weight is weight
    assert torch.equal(weight, before)
    other.load_state_dict(module.state_dict())
    assert not other.merged
    assert torch.equal(other(x, OFFSETS), y)
    module.merge(keep_weight=False)
    with pytest.raises(RuntimeError, match="let the weight go"):
        module.unmerge()
    on_meta = type(module)(K, N, E, 3, device="meta", dtype=torch.float64, **KINDS[kind][1])
    on_meta.load_state_dict(module.state_dict(), assign=True)
    assert torch.equal(on_meta(x, OFFSETS), module(x, OFFSETS))


def test_a_merge_that_is_not_finite_changes_nothing() -> None:
    module = make("lora")
    module.B.data[1, 0, 0] = math.inf
    weight = module.weight
    with pytest.raises(ValueError, match="merged weight must be finite"):
        module.merge()
    assert module.weight is weight


@every_kind
def test_shares_the_weight_and_starts_anew(kind: str) -> None:
    """Norms and magnitudes are taken from the weight as it is when the adapters start."""
    weight = torch.randn(E, N, K, dtype=torch.float64)
    module = KINDS[kind][0].from_weight(weight, None, 3)
    assert module.weight.data_ptr() == weight.data_ptr()
    assert module.bias is None
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1, weight_decay=0.5)
    before, x = weight.clone(), torch.randn(9, K, dtype=torch.float64)
    for _ in range(2):
        module(x, OFFSETS).square().sum().backward()
        optimizer.step()
    assert torch.equal(weight, before)
    weight.mul_(2)
    module.reset_parameters()
    assert relative_error(module(x, OFFSETS), frozen_of(weight, x)) <= 1e-13


def frozen_of(weight: Tensor, x: Tensor) -> Tensor:
    zeros = torch.zeros(E, 1, K, dtype=x.dtype), torch.zeros(E, N, 1, dtype=x.dtype)
    return reference.grouped_lora_linear(x, weight, *zeros, OFFSETS)


def test_repr() -> None:
    text = "in_features=14, out_features=10, experts=3, r=3, bias=True, dropout_p=0.0"
    assert repr(make("rslora")) == f"GroupedLoRALinear({text}, alpha=3.0, rslora=True)"
    assert repr(make("delora")) == f"GroupedDeLoRALinear({text}, initial_lam=2.0)"


@pytest.mark.parametrize(
    ("given", "kind", "words"),
    [
        ({"experts": 0}, ValueError, "experts must be ≥ 1, got 0"),
        ({"r": 2.0}, TypeError, "r must be an int, got float"),
        ({"alpha": math.nan}, ValueError, "alpha must be finite"),
        ({"dropout_p": 1.0}, ValueError, "dropout_p"),
    ],
)
def test_errors_name_the_argument(given: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=f"GroupedLoRALinear: {words}"):
        GroupedLoRALinear(6, 5, **given)


@every_kind
def test_a_merged_module_checks_its_input_too(kind: str) -> None:
    module, x = make(kind), torch.randn(11, K, dtype=torch.float64)
    module.merge()
    name = f"grouped_{kind.removeprefix('rs')}_linear"
    with pytest.raises(ValueError, match=rf"{name}: offsets must be \[E\] = \[3\]"):
        module(x, OFFSETS[:2])
    with pytest.raises(TypeError, match=f"{name}: x must be torch.float64, weight's dtype"):
        module(x.float(), OFFSETS)


def test_what_it_can_be_made_of() -> None:
    with pytest.raises(ValueError, match=r"GroupedLoRALinear.from_weight: weight must be 3-D \[E, N, K\]"):
        GroupedLoRALinear.from_weight(torch.zeros(5, 6))
    with pytest.raises(ValueError, match=r"bias must be \[E, N\] = \[2, 5\]"):
        GroupedLoRALinear.from_weight(torch.zeros(2, 5, 6), torch.zeros(5))
    with pytest.raises(TypeError, match="use from_weight"):
        GroupedLoRALinear.from_linear(torch.nn.Linear(6, 5))
    for decided in ({"dtype": torch.float64}, {"device": "cpu"}):
        with pytest.raises(TypeError, match="multiple values for keyword argument"):
            GroupedLoRALinear.from_weight(torch.zeros(2, 5, 6), None, 3, **decided)
