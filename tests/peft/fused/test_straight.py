"""The straight way of an accelerated call is left by everything that changes what it computes.

Each change is made to one accelerated layer, whose call is then judged twice: with the straight way
open, and by plan.py alone. Results, gradients and errors must be the same, and the way must have
been left wherever it leaves out what the change asks for.
"""

import runpy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from layer_changes import LEFT, REGISTERS
from peft.tuners.lora import dora as peft_dora
from straight_layers import METHODS, K, T, judged_twice, layer_of, outcome, same
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import delora_kernels as dk
from delora_kernels.backends import eager
from delora_kernels.integrations.peft.fused import straight, verdicts


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, T // 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize(("method", "name", "change"), LEFT, ids=[f"{method}-{name}" for method, name, _ in LEFT])
def test_a_change_leaves_it(
    method: str,
    name: str,
    change: Callable[[Any], Any],
    x: Tensor,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed)
    outcome(layer, x)
    assert len(taken) == 1
    change(layer)
    x = x.bfloat16() if "all in" in name else x
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 1
    same(*judged_twice(layer, x, monkeypatch, torch.no_grad))  # where nothing is frozen or trained


class _Functions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


CONTEXTS: dict[str, Callable[[], Any]] = {
    "function mode": _Functions,
    "dispatch mode": _Dispatches,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "backend asked for": lambda: dk.use_backend("eager"),
    "forward-mode level": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_a_watched_call_leaves_it(
    method: str,
    context: Callable[[], Any],
    x: Tensor,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed)
    same(*judged_twice(layer, x, monkeypatch, context))
    assert taken == []


@pytest.mark.parametrize("method", METHODS)
def test_what_the_input_is(
    method: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One token without a dimension, another dtype, another width, other layouts, subclasses."""
    layer = layer_of(method, seed)
    subclass = x[0].as_subclass(type("Marked", (Tensor,), {}))
    sparse, nested = x[0].to_sparse(), torch.nested.nested_tensor([x[0], x[0, :1]])
    for given in (x[0, 0], x.float(), x[..., :-1].contiguous(), subclass, sparse, nested, x[0].to("meta")):
        ours, theirs = judged_twice(layer, given, monkeypatch)
        if given.is_nested or given.is_meta or "y" not in theirs:
            assert (ours.keys(), ours.get("error")) == (theirs.keys(), theirs.get("error"))
        else:
            same(ours, theirs)
    assert taken == []
    same(*judged_twice(layer, x.transpose(0, 1), monkeypatch))
    same(*judged_twice(layer, x[:, :, None].expand(-1, -1, 2, -1), monkeypatch))
    assert len(taken) == 2


@pytest.mark.parametrize("dropout_p", [0.5, 0.0])
@pytest.mark.parametrize("method", METHODS)
def test_dropout(
    method: str, dropout_p: float, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Straight only where nothing drops; the draws are those of plan.py's call."""
    layer = layer_of(method, seed, dropout_p=0.5)
    dropout = next(module for name, module in layer.named_modules() if name.endswith("dropout.default"))
    dropout.p = dropout_p
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == (dropout_p == 0)
    layer.eval()
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == (dropout_p == 0) + 1
    dropout.inplace = True
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == (dropout_p == 0) + 1


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_all_modules(
    method: str, register: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(method, seed)
    handle = getattr(all_modules, register)(lambda *_: None)
    try:
        same(*judged_twice(layer, x, monkeypatch))
    finally:
        handle.remove()
    assert taken == []


REPLACED = [
    *((method, kind, "forward") for method in METHODS for kind in (nn.Linear, nn.Identity, nn.Dropout)),
    ("dora", peft_dora.DoraLinearLayer, "forward"),
    ("dora", peft_dora.DoraLinearLayer, "get_weight_norm"),
]


@pytest.mark.parametrize(("method", "kind", "name"), REPLACED)
def test_replaced_methods(
    method: str, kind: Any, name: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, defined = layer_of(method, seed), getattr(kind, name)
    monkeypatch.setattr(kind, name, lambda self, *a, **k: 2 * defined(self, *a, **k))
    same(*judged_twice(layer, x, monkeypatch))
    assert taken == []


@pytest.mark.parametrize("method", METHODS)
def test_an_untested_peft_and_its_cache(
    method: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(method, seed).eval()
    with monkeypatch.context() as patch:
        patch.setitem(verdicts.reasons, method, "untested")
        same(*judged_twice(layer, x, monkeypatch))
    if method == "dora" and hasattr(peft_dora, "ENABLE_DORA_CACHING"):
        monkeypatch.setattr(peft_dora, "ENABLE_DORA_CACHING", True)
        same(*judged_twice(layer, x, monkeypatch))
    assert taken == []


def test_the_environment_switches_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for value, expected in (("0", False), ("1", True)):
        monkeypatch.setenv(straight.ENVIRONMENT_VARIABLE, value)
        assert runpy.run_path(str(straight.__file__))["enabled"] is expected


@pytest.mark.parametrize("name", ["project", "expand", "expand_backward", "input_backward"])
@pytest.mark.parametrize("method", METHODS)
def test_replaced_ops_run(
    method: str, name: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, op, calls = layer_of(method, seed), getattr(eager, name), []
    monkeypatch.setattr(eager, name, lambda *arguments: calls.append(name) or op(*arguments))
    same(*judged_twice(layer, x, monkeypatch))
    assert (taken, calls) == ([], [name] * 2)
