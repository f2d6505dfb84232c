"""Changes of one accelerated layer, each of which leaves out what is done at one look: something is
switched, merged, hooked, replaced, frozen, retyped, kept elsewhere.
"""

from collections.abc import Callable
from typing import Any

import torch
from straight_layers import METHODS, K, N, R
from torch import Tensor, nn


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

REGISTERS = (
    "register_module_forward_hook",
    "register_module_forward_pre_hook",
    "register_module_full_backward_hook",
    "register_module_full_backward_pre_hook",
)
"""torch's functions that register hooks for all modules."""
