"""The straight way of an accelerated call: taken by the common call, left by everything that
changes it.

Each change is made to one accelerated layer, whose call is then judged twice: with the straight way
open, and by plan.py alone. Results, gradients, logs and errors must be the same, and the way must
have been left wherever it leaves out what the change asks for.
"""

import copy
import pickle
import runpy
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from peft.tuners.lora import dora as peft_dora
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

import delora_kernels as dk
from delora_kernels.autograd.low_rank import StraightLinear
from delora_kernels.backends import eager
from delora_kernels.integrations.peft.fused import straight, verdicts

METHODS = ("lora", "dora", "delora")
T, K, N, R = 6, 12, 20, 3


def layer_of(method: str, seed: int, dtype: torch.dtype = torch.float64, dropout_p: float = 0.0) -> Any:
    """An accelerated layer with two adapters, the first one active."""
    torch.manual_seed(seed)
    model: Any = nn.ModuleDict({"linear": nn.Linear(K, N)}).to(dtype)
    options: dict[str, Any] = {"r": R, "target_modules": ["linear"]}
    if method == "delora":
        config: Any = peft.DeloraConfig(init_weights=False, module_dropout=dropout_p, **options)
    else:
        lora = {"lora_alpha": 5, "init_lora_weights": False, "lora_dropout": dropout_p}
        config = peft.LoraConfig(use_dora=method == "dora", **lora, **options)
    made = peft.get_peft_model(model, config)
    made.add_adapter("other", config)
    dk.accelerate(made, strict=True)
    layer = made.base_model.model.linear
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1 and parameter.shape[0] == N:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    return layer.to(dtype)


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The method of every call that went the straight way."""
    found: list[str] = []
    run = StraightLinear.direct

    def seen(call: Any, backend: str) -> Tensor:
        found.append(call.options.method)
        return run(call, backend)

    monkeypatch.setattr(StraightLinear, "direct", staticmethod(seen))
    return found


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, T // 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))


def outcome(layer: Any, x: Tensor, context: Any = None) -> dict[str, Any]:
    """Everything that a call and its backward pass give, or what they raise."""
    x = x.detach().clone().requires_grad_(x.is_floating_point() and x.layout == torch.strided)
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    try:
        with context or nullcontext():
            y = layer(x)
            if y.requires_grad:
                (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def same(ours: dict[str, Any], theirs: dict[str, Any], bits: bool = True) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
            exact = bits and name == "y"
            finite = value[value.isfinite()].abs()
            limit = 64 * torch.finfo(value.dtype).eps * float(finite.max()) if finite.numel() and not exact else 0.0
            torch.testing.assert_close(ours[name], value, rtol=0, atol=limit, equal_nan=True, msg=name)
        else:
            assert ours[name] == value, name


def judged_twice(
    layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, context: Callable[[], Any] = nullcontext
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcome with the straight way open, and by plan.py alone."""
    ours = outcome(layer, x, context())
    with monkeypatch.context() as patch:
        patch.setattr(straight, "enabled", False)
        theirs = outcome(layer, x, context())
    return ours, theirs


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(T, K), (2, 3, K), (1, 1, 1, K), (0, K)])
@pytest.mark.parametrize("method", METHODS)
def test_the_common_call_takes_it(
    method: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed, dtype)
    x = torch.randn(shape, dtype=dtype)
    same(*judged_twice(layer, x, monkeypatch))
    assert taken == [f"{method}_linear"]
    for context in (torch.no_grad, torch.inference_mode):
        same(*judged_twice(layer, x, monkeypatch, context))
    assert len(taken) == 3
    layer.eval()
    same(*judged_twice(layer, x, monkeypatch))
    layer.set_adapter(["other"])
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 5


def _base(layer: Any) -> Any:
    return layer.base_layer


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


CHANGES: dict[str, Callable[[Any], Any]] = {
    "disabled": lambda layer: layer.enable_adapters(False),
    "merged": lambda layer: layer.merge(),
    "two adapters": lambda layer: layer.set_adapter(["default", "other"]),
    "no adapter": lambda layer: setattr(layer, "_active_adapter", ["missing"]),
    "base of another class": lambda layer: _become(_base(layer), Derived),
    "base trained": lambda layer: _base(layer).weight.requires_grad_(),
    "bias trained": lambda layer: _base(layer).bias.requires_grad_(),
    "base in float32": lambda layer: _base(layer).float(),
    "base weight not a parameter": lambda layer: nn.utils.parametrize.register_parametrization(
        _base(layer), "weight", nn.Identity()
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
    "A kept elsewhere": lambda layer: _become(layer.lora_A, type("Wrapped", (nn.ModuleDict,), {})),
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
    "A kept elsewhere": lambda layer: _become(layer.delora_A, type("Wrapped", (nn.ParameterDict,), {})),
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
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 1
    same(*judged_twice(layer, x, monkeypatch, torch.no_grad))  # where nothing is frozen or trained


def _changed_scaling(layer: Any) -> None:
    layer.scaling["default"] *= 3


def _data_replaced(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0) * 2


def _parameters_replaced(layer: Any) -> None:
    for module in list(layer.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach() * 2, parameter.requires_grad)


STAYS: dict[str, Callable[[Any], Any]] = {
    "data replaced": _data_replaced,
    "parameters replaced": _parameters_replaced,
    "written in place": lambda layer: [p.data.mul_(2) for p in layer.parameters()],
    "transposed strides": lambda layer: setattr(_base(layer).weight, "data", _base(layer).weight.data.t().clone().t()),
    "no bias": lambda layer: setattr(_base(layer), "bias", None),
    "merged and back": lambda layer: (layer.merge(), layer.unmerge()),
    "switched and back": lambda layer: (layer.set_adapter(["other"]), layer.set_adapter(["default"])),
}


@pytest.mark.parametrize("change", STAYS.values(), ids=STAYS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_new_numbers_are_seen(
    method: str,
    change: Callable[[Any], Any],
    x: Tensor,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed)
    outcome(layer, x)
    change(layer)
    if method != "delora":
        _changed_scaling(layer)
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 2


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
            assert ours.keys() == theirs.keys()
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


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_on_the_layer(method: str, x: Tensor, seed: int, taken: list[str]) -> None:
    layer = layer_of(method, seed)
    before = set(layer.__dict__)
    expected = outcome(layer, x)
    assert set(layer.__dict__) == before
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(outcome(twin, x), expected)
    assert len(taken) == 3


@pytest.mark.parametrize("method", METHODS)
def test_extraordinary_backward_passes(
    method: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast around backward alone, batched gradients, a second derivative: as without it."""
    layer = layer_of(method, seed)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def results() -> list[Any]:
        given = x.clone().requires_grad_()
        found: list[Any] = []
        y = layer(given)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        with torch.autocast("cpu", torch.bfloat16):
            found += torch.autograd.grad(y, [given, *trained], dy, retain_graph=True)
        batch = torch.stack([dy, 2 * dy])
        found += torch.autograd.grad(y, [given, *trained], batch, is_grads_batched=True, retain_graph=True)
        grads = torch.autograd.grad(y, [given, *trained], dy, create_graph=True)
        found += [grad.detach() for grad in grads]
        for grad in grads:
            with pytest.raises(RuntimeError) as raised:
                grad.square().sum().backward(retain_graph=True)
            found.append(str(raised.value))
        return found

    ours = results()
    monkeypatch.setattr(straight, "enabled", False)
    theirs = results()
    assert len(taken) == 1
    same(dict(enumerate(ours)), dict(enumerate(theirs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("method", METHODS)
def test_consumers_may_write_into_the_output(method: str, x: Tensor, seed: int, taken: list[str]) -> None:
    layer = layer_of(method, seed)
    for given in (x, x[0]):
        once, twice = given.clone().requires_grad_(), given.clone().requires_grad_()
        (layer(once).relu_() * 3).sum().backward()
        (layer(twice).relu() * 3).sum().backward()
        assert torch.equal(once.grad, twice.grad)
    assert len(taken) == 4


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
