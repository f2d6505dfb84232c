"""PEFT: swap its eager adapter layers for fused ones, in place.

A layer keeps its identity: only its class changes, to a subclass whose forward calls the fused function. Parameters,
names, state dict, config and every PEFT method stay. At each call the parameters are looked up through the modules that
own them, and whatever is not provably a plain LoRA, DoRA or DeLoRA linear runs PEFT's own forward.
"""

import logging
from collections.abc import Callable
from functools import partial
from itertools import chain
from numbers import Real
from typing import Any

import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from delora_kernels import functional
from delora_kernels.frozen import FrozenLinear, why_not_local, why_not_plain
from delora_kernels.integrations.report import LayerReport, Report

logger = logging.getLogger(__name__)

Fused = Callable[[Tensor], Tensor]

_STATES = ("its adapters are disabled", "its adapter is merged", "it has no active adapter")
"""Reasons that a user brings about on purpose: nothing to log."""


class FusedLoraLinear(LoraLinear):
    """PEFT's LoRA or DoRA linear with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, LoraLinear.forward, x, args, kwargs)


class FusedDeloraLinear(DeloraLinear):
    """PEFT's DeLoRA linear with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, DeloraLinear.forward, x, args, kwargs)


_FUSED_CLASSES: dict[type, type] = {
    LoraLinear: FusedLoraLinear,
    DeloraLinear: FusedDeloraLinear,
}
_PEFT_CLASSES = {fused: original for original, fused in _FUSED_CLASSES.items()}


def accelerate(model: nn.Module, strict: bool = False) -> Report:
    """Make PEFT's LoRA, rsLoRA, DoRA and DeLoRA layers on nn.Linear and Transformers' Conv1D run fused, in place.

    Outputs, gradients, parameters, state dict and PEFT's methods stay what they were; the numbers differ by rounding.
    Calling it again is harmless, and brings in layers that were added since.

    Args:
        model: Any module that holds PEFT adapter layers: a PeftModel, a bare model with injected adapters, one layer.
        strict: Raise, before anything is changed, unless every adapter layer can be fused.

    Returns:
        The report: each adapter layer, fused or with the reason why it runs PEFT's own forward.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no PEFT adapter layer.
        RuntimeError: `strict` and a layer can't be fused; the text is the report.
    """
    layers = _adapter_layers(model, "accelerate")
    if not layers:
        raise ValueError(
            f"accelerate: model must hold PEFT adapter layers, got a {type(model).__name__} without any; "
            "wrap it with peft.get_peft_model first"
        )
    report = Report(tuple(_describe(name, layer) for name, layer in layers))
    if strict and report.declined:
        raise RuntimeError(f"accelerate: strict=True, but not every adapter layer can be fused: {report}")
    for _, layer in layers:
        layer.__class__ = _FUSED_CLASSES.get(type(layer), type(layer))
    return report


def restore(model: nn.Module) -> int:
    """Undo accelerate(): give every fused layer PEFT's own class back, in place.

    Returns:
        The number of layers restored.

    Raises:
        TypeError: `model` is not a module.
    """
    fused = [layer for _, layer in _adapter_layers(model, "restore") if type(layer) in _PEFT_CLASSES]
    for layer in fused:
        layer.__class__ = _PEFT_CLASSES[type(layer)]
    return len(fused)


def _adapter_layers(model: nn.Module, function: str) -> list[tuple[str, BaseTunerLayer]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}; pass the PEFT model")
    return [(name, module) for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)]


def _describe(name: str, layer: Any) -> LayerReport:
    plan = _plan(layer)
    return LayerReport(name, _method(layer), plan if isinstance(plan, str) else None)


def _method(layer: Any) -> str:
    if isinstance(layer, DeloraLinear):
        return "delora"
    if not isinstance(layer, LoraLinear):
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__qualname__}"
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    return "dora" if any(isinstance(layer.lora_variant.get(name), DoraLinearVariant) for name in names) else "lora"


def _forward(layer: Any, peft_forward: Callable[..., Tensor], x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    plan = _plan(layer)
    if not isinstance(plan, str):
        reason = _why_not_call(layer, x, args, kwargs)
        if reason is None:
            return plan(x)
        plan = reason
    if plan not in _STATES and not torch.compiler.is_compiling():
        _log_once(plan)
    return peft_forward(layer, x, *args, **kwargs)


_logged: set[str] = set()


def _log_once(reason: str) -> None:
    if reason not in _logged:
        _logged.add(reason)
        logger.warning("an accelerated layer runs PEFT's own forward: %s", reason)


def _why_not_call(layer: Any, x: Tensor, args: Any, kwargs: dict[str, Any]) -> str | None:
    """Why this call needs PEFT's own forward, or None."""
    if args or any(value is not None for value in kwargs.values()):
        return f"it is called with {', '.join(kwargs) or 'positional arguments'}"
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__}"
    transform = functional.active_transform(chain((x,), layer.parameters()))
    if transform is not None:
        return f"{transform} are under way"
    weight = layer.get_base_layer().weight
    if x.device != weight.device:
        return "its input is on another device"
    if x.dtype != weight.dtype and not torch.is_autocast_enabled(x.device.type):
        return f"its input is {x.dtype}, its base {weight.dtype}"
    return None


def _plan(layer: Any) -> Fused | str:
    """What computes the layer's output from its input x, or the reason why it must be PEFT's own forward."""
    if type(layer) not in _FUSED_CLASSES and type(layer) not in _PEFT_CLASSES:
        return f"{type(layer).__module__.removeprefix('peft.tuners.')}.{type(layer).__qualname__} layers are not fused"
    if "forward" in layer.__dict__:
        return "it has a forward of its own"
    if layer.disable_adapters:
        return _STATES[0]
    if layer.merged:
        return _STATES[1]
    is_delora = isinstance(layer, DeloraLinear)
    names = [name for name in layer.active_adapters if name in (layer.delora_A if is_delora else layer.lora_A)]
    if not names:
        return _STATES[2]
    if len(names) > 1:
        return f"it has {len(names)} active adapters"
    base = FrozenLinear.of(layer.base_layer)
    if isinstance(base, str):
        return base
    return _delora_plan(layer, names[0], base) if is_delora else _lora_plan(layer, names[0], base)


def _lora_plan(layer: Any, name: str, base: FrozenLinear) -> Fused | str:
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) is not DoraLinearVariant:
        return f"its LoRA variant {type(variant).__name__} is not fused"
    if layer.lora_bias.get(name):
        return "lora_bias=True"
    if not layer.cast_input_dtype_enabled:
        return "the cast of its input is disabled"
    owners = {"lora_A": layer.lora_A[name], "lora_B": layer.lora_B[name]}
    for role, owner in owners.items():
        if type(owner) is not nn.Linear:
            return f"its {role} is a {type(owner).__name__}"
        if owner.bias is not None:
            return f"its {role} has a bias"
    if variant is not None:
        owners["magnitude"] = layer.lora_magnitude_vector[name]
        if type(owners["magnitude"]) is not DoraLinearLayer:
            return f"its magnitude is a {type(owners['magnitude']).__name__}"
        if dora.ENABLE_DORA_CACHING and not layer.training:
            return "PEFT's cache of DoRA norms is on"
    for role, owner in owners.items():
        reason = why_not_plain(owner, role)
        if reason is not None:
            return reason
    tensors = {role: owner.weight for role, owner in owners.items()}
    dropout_p = _dropout_p(layer.lora_dropout[name])
    if isinstance(dropout_p, str):
        return dropout_p
    reason = _why_not_tensors(base, tensors)
    if reason is not None:
        return reason
    scale = layer.scaling[name]
    if not isinstance(scale, Real):
        return f"its scaling is a {type(scale).__name__}"
    if variant is not None and not layer.training:
        dropout_p = 0.0  # PEFT's DoRA asks the layer, not its dropout, whether it trains
    options: dict[str, Any] = {"scale": float(scale), "bias": base.bias, "dropout_p": dropout_p}
    A, B = tensors["lora_A"], tensors["lora_B"]
    if variant is None:
        return partial(functional.lora_linear, weight=base.weight, A=A, B=B, **options)
    return partial(functional.dora_linear, weight=base.weight, A=A, B=B, magnitude=tensors["magnitude"], **options)


def _delora_plan(layer: Any, name: str, base: FrozenLinear) -> Fused | str:
    roles = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    tensors = {role: getattr(layer, role)[name] for role in roles}
    dropout_p = _dropout_p(layer.delora_dropout[name])
    if isinstance(dropout_p, str):
        return dropout_p
    reason = _why_not_tensors(base, tensors)
    if reason is not None:
        return reason
    if layer.r[name] != tensors["delora_A"].shape[0]:
        return "its rank is not that of delora_A"

    def fused(x: Tensor) -> Tensor:
        A, B, lam, weight_norm = tensors.values()
        y = functional.delora_linear(x, base.weight, A, B, lam, weight_norm, base.bias, dropout_p=dropout_p)
        return y.to(x.dtype)  # as PEFT's DeLoRA, unlike its LoRA, does under autocast

    return fused


def _dropout_p(dropout: Any) -> float | str:
    """The probability that `dropout` drops with now, or why it can't be said."""
    if type(dropout) not in (nn.Identity, nn.Dropout) or why_not_plain(dropout, "dropout") is not None:
        return f"its dropout is a {type(dropout).__name__} that can't be fused"
    if type(dropout) is nn.Identity:
        return 0.0
    if dropout.p >= 1:
        return "its dropout drops everything"
    return dropout.p if dropout.training else 0.0


def _why_not_tensors(base: FrozenLinear, tensors: dict[str, Tensor]) -> str | None:
    for role, tensor in tensors.items():
        reason = why_not_local(tensor, role)
        if reason is not None:
            return reason
        if tensor.device != base.weight.device:
            return f"its {role} is on another device than its base"
    return None
