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
from peft.tuners.lora import dora as peft_dora
from straight_layers import METHODS, K, N, R, T, judged_twice, layer_of, outcome, same
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


def _owner(layer: Any, role: str) -> Any:
    found = getattr(layer, role)
    return found["default"] if isinstance(found, nn.ModuleDict) else found


OWNERS: dict[str, tuple[str, ...]] = {
    "lora": ("base_layer", "lora_A", "lora_B", "lora_dropout"),
    "dora": ("base_layer", "lora_A", "lora_B", "lora_dropout", "lora_magnitude_vector"),
    "delora": ("base_layer", "delora_dropout"),
}


HOOKS: dict[str, Callable[[nn.Module], Any]] = {
    "forward hook": lambda module: module.register_forward_hook(lambda *_: None),
    "forward pre-hook": lambda module: module.register_forward_pre_hook(lambda *_: None),
    "backward hook": lambda module: module.register_full_backward_hook(lambda *_: None),
    "backward pre-hook": lambda module: module.register_full_backward_pre_hook(lambda *_: None),
    "forward of its own": lambda module: setattr(module, "forward", lambda *a, m=module: type(m).forward(m, *a) * 1),
}


class Derived(nn.Linear):
    """A linear that might do more."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


def _become(module: nn.Module, kind: type) -> None:
    module.__class__ = kind


class Marked(Tensor):
    """A tensor that might do more."""


def _mark(tensors: Any, name: str) -> None:
    tensors[name] = tensors[name].detach().as_subclass(Marked)


def _cut(tensor: Tensor, dim: int, size: int) -> None:
    tensor.data = tensor.data.narrow(dim, 0, size)


def _wrapped(owner: nn.Module) -> None:
    owner.__class__ = type("Wrapped", (type(owner),), {})


def _without_rows(layer: Any, B: Any) -> None:
    for tensor in (layer.base_layer.weight, layer.base_layer.bias, B):
        _cut(tensor, 0, 0)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "no adapter": lambda layer: setattr(layer, "_active_adapter", ["missing"]),
    "base of another class": lambda layer: _become(layer.base_layer, Derived),
    "base trained": lambda layer: layer.base_layer.weight.requires_grad_(),
    "bias trained": lambda layer: layer.base_layer.bias.requires_grad_(),
    "base in float32": lambda layer: layer.base_layer.float(),
    "base weight alone in float32": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.data.float()
    ),
    "all in bfloat16": lambda layer: layer.bfloat16(),
    "base weight not a parameter": lambda layer: nn.utils.parametrize.register_parametrization(
        layer.base_layer, "weight", nn.Identity()
    ),
    "layer with a forward of its own": lambda layer: HOOKS["forward of its own"](layer),
}


LORA_CHANGES: dict[str, Callable[[Any], Any]] = {
    "A of another class": lambda layer: _become(layer.lora_A["default"], Derived),
    "B of another class": lambda layer: _become(layer.lora_B["default"], Derived),
    "A frozen": lambda layer: layer.lora_A["default"].weight.requires_grad_(False),
    "B frozen": lambda layer: layer.lora_B["default"].weight.requires_grad_(False),
    "A in float32": lambda layer: layer.lora_A["default"].float(),
    "B in float32": lambda layer: layer.lora_B["default"].float(),
    "A with a bias": lambda layer: setattr(layer.lora_A["default"], "bias", nn.Parameter(torch.ones(R).double())),
    "B with a bias": lambda layer: setattr(layer.lora_B["default"], "bias", nn.Parameter(torch.ones(N).double())),
    "A kept elsewhere": lambda layer: _wrapped(layer.lora_A),
    "A too narrow": lambda layer: _cut(layer.lora_A["default"].weight, 1, K - 1),
    "B too short": lambda layer: _cut(layer.lora_B["default"].weight, 0, N - 1),
    "B of another rank": lambda layer: _cut(layer.lora_B["default"].weight, 1, R - 1),
    "no rank": lambda layer: [_cut(layer.lora_A["default"].weight, 0, 0), _cut(layer.lora_B["default"].weight, 1, 0)],
    "no rows": lambda layer: _without_rows(layer, layer.lora_B["default"].weight),
    "another dropout": lambda layer: layer.lora_dropout.update({"default": nn.AlphaDropout(0.0)}),
    "lora_bias": lambda layer: layer.lora_bias.update(default=True),
    "cast disabled": lambda layer: setattr(layer, "cast_input_dtype_enabled", False),
    "scaling not finite": lambda layer: layer.scaling.update(default=float("inf")),
    "scaling a tensor": lambda layer: layer.scaling.update(default=torch.tensor(2.0).double()),
}


DORA_CHANGES: dict[str, Callable[[Any], Any]] = {
    "another variant": lambda layer: layer.lora_variant.update(
        default=type("Variant", (type(layer.lora_variant["default"]),), {})()
    ),
    "magnitude frozen": lambda layer: layer.lora_magnitude_vector["default"].weight.requires_grad_(False),
    "magnitude in float32": lambda layer: layer.lora_magnitude_vector["default"].float(),
    "magnitude of another class": lambda layer: _become(
        layer.lora_magnitude_vector["default"],
        type("Mine", (type(layer.lora_magnitude_vector["default"]),), {}),
    ),
    "magnitude of a subclass": lambda layer: _mark(layer.lora_magnitude_vector["default"]._parameters, "weight"),
    "magnitude of one number": lambda layer: _cut(layer.lora_magnitude_vector["default"].weight, 0, 1),
    "magnitude kept elsewhere": lambda layer: _wrapped(layer.lora_magnitude_vector),
    "another axis": lambda layer: setattr(layer.lora_magnitude_vector["default"], "fan_in_fan_out", True),
}


DELORA_CHANGES: dict[str, Callable[[Any], Any]] = {
    "A frozen": lambda layer: layer.delora_A["default"].requires_grad_(False),
    "B frozen": lambda layer: layer.delora_B["default"].requires_grad_(False),
    "λ frozen": lambda layer: layer.delora_lambda["default"].requires_grad_(False),
    "λ in float32": lambda layer: layer.delora_lambda.float(),
    "A in float32": lambda layer: layer.delora_A.float(),
    "norms in float32": lambda layer: layer.delora_w_norm.float(),
    "norms trained": lambda layer: layer.delora_w_norm["default"].requires_grad_(),
    "another rank": lambda layer: layer.r.update(default=R + 1),
    "A kept elsewhere": lambda layer: _wrapped(layer.delora_A),
    "norms kept elsewhere": lambda layer: _wrapped(layer.delora_w_norm),
    "λ of a subclass": lambda layer: _mark(layer.delora_lambda._parameters, "default"),
    "norms of a subclass": lambda layer: _mark(layer.delora_w_norm._buffers, "default"),
    "norms of one number": lambda layer: _cut(layer.delora_w_norm["default"], 0, 1),
    "A too narrow": lambda layer: _cut(layer.delora_A["default"], 1, K - 1),
    "B of another rank": lambda layer: _cut(layer.delora_B["default"], 1, R - 1),
    "no rows": lambda layer: _without_rows(layer, layer.delora_B["default"]),
    "another dropout": lambda layer: layer.delora_dropout.update({"default": nn.AlphaDropout(0.0)}),
}


LEFT = (
    [(method, name, change) for method in METHODS for name, change in CHANGES.items()]
    + [(method, name, change) for method in ("lora", "dora") for name, change in LORA_CHANGES.items()]
    + [("dora", name, change) for name, change in DORA_CHANGES.items()]
    + [("delora", name, change) for name, change in DELORA_CHANGES.items()]
    + [
        (method, f"{role} with a {name}", lambda layer, role=role, hook=hook: hook(_owner(layer, role)))
        for method, roles in OWNERS.items()
        for role in roles
        for name, hook in HOOKS.items()
    ]
)


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


REGISTERS = (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
)


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
