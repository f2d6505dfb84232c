"""Merging, unmerging and the states that a module is saved, loaded and copied in."""

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from nn_modules import EPS, KINDS, every_dtype, every_kind, make, oracle
from torch import nn

from delora_kernels.nn import DoRALinear, base
from delora_kernels.testing import relative_error


@every_dtype
@every_kind
def test_merge(kind: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(base, "_CHUNK_ELEMENTS", 45)  # three rows
    module, linear = make(kind, dtype, dropout_p=0.0)
    x = torch.randn(6, 14, dtype=dtype)
    y, weight, before = module(x), module.weight, linear.weight.detach().clone()
    adapted = oracle(module).weight
    module.merge()
    assert module.merged
    assert not module.weight.requires_grad
    assert module.weight.dtype == dtype
    # rounded once: half a unit in the last place of each element, beside the rounding of the
    # arithmetic
    error = (module.weight.double() - adapted).abs()
    arithmetic = 4 * EPS[torch.promote_types(dtype, torch.float32)] * adapted.abs().max()
    assert (error <= adapted.abs() * EPS[dtype] / 2 + arithmetic).all()
    assert relative_error(module(x), y) <= 8 * EPS[dtype]
    if isinstance(module, DoRALinear):
        assert relative_error(module.weight.double().norm(dim=1), module.magnitude.abs()) <= 2 * EPS[dtype]
    with pytest.raises(RuntimeError, match="unmerge"):
        module.merge()
    with pytest.raises(RuntimeError, match="unmerge"):
        module.reset_parameters()
    module.unmerge()
    assert module.weight is weight
    assert not module.merged
    assert torch.equal(module(x), y)
    assert torch.equal(weight, before)
    assert torch.equal(linear.weight, before)
    with pytest.raises(RuntimeError, match="merge"):
        module.unmerge()


def test_merge_can_let_the_weight_go() -> None:
    module, linear = make("dora")
    x = torch.randn(6, 14, dtype=torch.float64)
    y, before = module(x), linear.weight.detach().clone()
    module.merge(keep_weight=False)
    assert relative_error(module(x), y) <= 1e-13
    assert module.base_weight.numel() == 0
    assert module.weight is not linear.weight
    with pytest.raises(RuntimeError, match="keep_weight"):
        module.unmerge()
    assert torch.equal(linear.weight, before)


@every_kind
def test_merge_ignores_the_callers_modes(kind: str) -> None:
    module, _ = make(kind, torch.float32)
    adapted = oracle(module).weight
    x = torch.randn(6, 14, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
        module.merge()
    assert relative_error(module.weight, adapted) <= 1e-6
    module(x).sum().backward()  # the weight is no inference tensor
    assert relative_error(x.grad, adapted.sum(0).expand(6, 14)) <= 1e-5


@pytest.mark.parametrize("value", [math.nan, math.inf, 1e30])  # 1e30 overflows float16 only when rounded
@every_kind
def test_merge_refuses_what_is_not_finite(kind: str, value: float) -> None:
    module, linear = make(kind, torch.float16)
    target = {"delora": "lam", "dora": "magnitude"}.get(kind.split("-")[0], "B")
    module.get_parameter(target).data.view(-1)[0] = value
    weight, before = module.weight, linear.weight.detach().clone()
    with pytest.raises(ValueError, match=type(module).__name__):
        module.merge()
    assert module.weight is weight
    assert torch.equal(weight, before)
    assert not module.merged
    module.merge(check_finite=False)
    assert not module.weight.isfinite().all()
    module.unmerge()
    assert torch.equal(module.weight, before)


STATES: dict[str, Callable[[Any], Any]] = {
    "unmerged": lambda module: None,
    "merged": lambda module: module.merge(),
    "let go": lambda module: module.merge(keep_weight=False),
}


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("into", STATES)
@pytest.mark.parametrize("saved", STATES)
@every_kind
def test_state_dict(kind: str, saved: str, into: str, assign: bool, tmp_path: Any) -> None:
    (module, _), (other, linear) = make(kind), make(kind)
    STATES[saved](module)
    STATES[into](other)
    x = torch.randn(6, 14, dtype=torch.float64)
    torch.save(nn.Sequential(module).state_dict(), tmp_path / "state")
    state = torch.load(tmp_path / "state")
    own = {"weight", "A", "B", *KINDS[kind][2], *KINDS[kind][3]} | ({"bias"} if module.bias is not None else set())
    assert state.keys() == {f"0.{name}" for name in own | ({"base_weight"} if saved != "unmerged" else set())}
    alias = linear.weight.detach()
    nn.Sequential(other).load_state_dict(state, assign=assign)
    assert other.merged == module.merged
    assert torch.equal(other(x), module(x))
    trained = [{name for name, p in m.named_parameters() if p.requires_grad} for m in (module, other)]
    assert trained[0] == trained[1] == {"A", "B"} | KINDS[kind][2]
    if saved == "merged":
        module.unmerge()
        other.unmerge()
        assert torch.equal(other.weight, module.weight)
        assert torch.equal(other(x), module(x))
    if saved != "unmerged":
        # W' never lands in a tensor that the caller's linear holds
        assert not torch.equal(alias, state["0.weight"])
        plain = nn.Linear(14, 10, dtype=torch.float64)
        plain.load_state_dict({k.removeprefix("0."): v for k, v in state.items()}, strict=False)
        assert torch.equal(plain.weight, state["0.weight"])


def test_state_dict_of_the_adapter_alone() -> None:
    (module, _), (other, _) = make("lora"), make("lora")
    adapter = {name: value for name, value in module.state_dict().items() if name in ("A", "B")}
    weight = other.weight
    other.merge()
    other.load_state_dict({"elsewhere": torch.ones(1)}, strict=False)
    assert other.merged
    other.load_state_dict(adapter, strict=False)
    assert other.weight is weight
    assert not other.merged
    assert torch.equal(other.A, module.A)
    other.merge(keep_weight=False)
    with pytest.raises(RuntimeError, match=r"LoRALinear\.load_state_dict .*keep_weight"):
        other.load_state_dict(adapter, strict=False)
    module.merge()
    broken = {name: value for name, value in module.state_dict().items() if name != "weight"}
    with pytest.raises(RuntimeError, match="base_weight"):
        other.load_state_dict(broken, strict=False)


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
@pytest.mark.parametrize("state", STATES)
@every_kind
def test_copies(kind: str, state: str, clone: Callable[[Any], Any]) -> None:
    module, _ = make(kind)
    STATES[state](module)
    x = torch.randn(6, 14, dtype=torch.float64)
    y, twin = module(x), clone(module)
    for tensor in (*twin.parameters(), *twin.buffers()):
        tensor.data.zero_()
    assert torch.equal(module(x), y)
    assert not torch.equal(twin(x), y)
    assert repr(twin) == repr(module)
    assert twin.merged == module.merged
