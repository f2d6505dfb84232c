"""What a layer of one adapter on a plain nn.Linear is made of, found at one look.

Most layers are so: nothing is switched off, merged, hooked, replaced or kept elsewhere, and no
dropout is at work. Such a layer is recognised in one go, from the objects as they stand: nothing is
kept between calls, so nothing can be out of date. Whatever is not exactly so gives None, and
plan.py judges it, with words. What the tensors found here are is left to those who run on them:
straight.py and on_kernels.py.
"""

import math
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import nn

from delora_kernels.bases.plain import any_module_has_hooks
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.plan import caches_dora_norms, methods_of

_MISSING = object()
_CALLED_BY_LORA = methods_of(LoraLinear, nn.Linear, nn.Identity, nn.Dropout)
_CALLED_BY_DORA = methods_of(DoraLinearVariant, DoraLinearLayer)
_CALLED_BY_DELORA = methods_of(DeloraLinear, nn.Linear, nn.Identity, nn.Dropout)


def lora_parts(layer: Any) -> tuple[float, Any, Any, Any, Any, Any] | None:
    """Find what a LoRA or DoRA linear computes with: its scale, W, bias, A, B, and DoRA's
    magnitude (of LoRA None); or None where plan.py has to judge it.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    name, parts = _only(layer._active_adapter), layer._modules
    A_dict, B_dict, dropouts, base = parts["lora_A"], parts["lora_B"], parts["lora_dropout"], parts["base_layer"]
    if not type(A_dict) is type(B_dict) is type(dropouts) is nn.ModuleDict:
        return None
    A_linear, B_linear = A_dict._modules.get(name), B_dict._modules.get(name)
    if not type(A_linear) is type(B_linear) is type(base) is nn.Linear:
        return None
    if not layer.cast_input_dtype_enabled or layer.lora_bias.get(name):
        return None
    variant, scale = layer.lora_variant.get(name), layer.scaling[name]
    if type(scale) is not float or not -math.inf < scale < math.inf or verdicts.reasons["lora"] is not None:
        return None
    dropout = dropouts._modules[name]
    if _drops(dropout, layer.training if variant is not None else True):
        return None
    if not are_plain(A_linear, B_linear, base, dropout) or "forward" in layer.__dict__:
        return None
    if any_module_has_hooks() or _any_replaced(_CALLED_BY_LORA):
        return None
    A_tensors, B_tensors = A_linear._parameters, B_linear._parameters
    if A_tensors.get("bias", _MISSING) is not None or B_tensors.get("bias", _MISSING) is not None:
        return None
    tensors: Any = base._parameters.get("weight"), base._parameters.get("bias", _MISSING)
    tensors += A_tensors.get("weight"), B_tensors.get("weight")
    if not _are_parameters(*tensors):
        return None
    if variant is None:
        return scale, *tensors, None
    magnitudes = parts["lora_magnitude_vector"]
    if type(variant) is not DoraLinearVariant or type(magnitudes) is not nn.ModuleDict:
        return None
    owner = magnitudes._modules.get(name)
    if type(owner) is not DoraLinearLayer or owner.fan_in_fan_out or not are_plain(owner):
        return None
    if verdicts.reasons["dora"] is not None or _any_replaced(_CALLED_BY_DORA) or caches_dora_norms(layer):
        return None
    magnitude = owner._parameters.get("weight")
    return (scale, *tensors, magnitude) if type(magnitude) is nn.Parameter else None


def delora_parts(layer: Any) -> tuple[int, Any, Any, Any, Any, Any, Any] | None:
    """Find what a DeLoRA linear computes with: its rank, W, bias, A, B, λ and the weight's norms;
    or None where plan.py has to judge it.
    """
    if layer._disable_adapters or layer.merged_adapters:
        return None
    name, parts = _only(layer._active_adapter), layer._modules
    A_dict, B_dict, lams = parts["delora_A"], parts["delora_B"], parts["delora_lambda"]
    norms, dropouts, base = parts["delora_w_norm"], parts["delora_dropout"], parts["base_layer"]
    if not type(A_dict) is type(B_dict) is type(lams) is nn.ParameterDict or type(norms) is not BufferDict:
        return None
    if type(dropouts) is not nn.ModuleDict or type(base) is not nn.Linear or name not in A_dict._parameters:
        return None
    dropout = dropouts._modules[name]
    if verdicts.reasons["delora"] is not None or _drops(dropout, True):
        return None
    if not are_plain(base, dropout) or "forward" in layer.__dict__:
        return None
    if any_module_has_hooks() or _any_replaced(_CALLED_BY_DELORA):
        return None
    tensors: Any = base._parameters.get("weight"), base._parameters.get("bias", _MISSING)
    tensors += A_dict._parameters[name], B_dict._parameters[name]
    lam = lams._parameters[name]
    if type(lam) is not nn.Parameter or not _are_parameters(*tensors):
        return None
    return layer.r[name], *tensors, lam, norms._buffers[name]


def are_plain(*modules: Any) -> bool:
    """Whether calling any of these modules is its class's forward and no more."""
    for module in modules:
        if (
            module._forward_hooks
            or module._forward_pre_hooks
            or module._backward_hooks
            or module._backward_pre_hooks
            or "forward" in module.__dict__
        ):
            return False
    return True


def _are_parameters(weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether these are what nn.Linear keeps: no subclass, no view in the place of a parameter."""
    return type(weight) is type(A) is type(B) is nn.Parameter and (bias is None or type(bias) is nn.Parameter)


def _only(active: Any) -> Any:
    """Return the name of the one active adapter, or None."""
    return active if type(active) is str else active[0] if len(active) == 1 else None


def _drops(dropout: Any, trains: bool) -> bool:
    """Whether a dropout module, but for its hooks, may do something, or is one that plan.py has to
    look at.
    """
    kind = type(dropout)
    if kind is nn.Identity:
        return False
    return kind is not nn.Dropout or dropout.inplace or (dropout.p > 0 and dropout.training and trains)


def _any_replaced(methods: tuple[tuple[Any, str, Any], ...]) -> bool:
    """Whether somebody has put another method in the place of one that PEFT's forward calls."""
    for kind, name, method in methods:  # noqa: SIM110  # a generator takes twice as long, at every call
        if getattr(kind, name) is not method:
            return True
    return False
