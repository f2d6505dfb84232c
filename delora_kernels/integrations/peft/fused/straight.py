"""The straight way through a fused layer: one look at everything that plan.py judges, then the
arithmetic.

Most calls are of one adapter on a plain nn.Linear, with tensors of one dtype on a CPU and nobody
who watches. Such a call is recognised in one go, from the objects as they stand: nothing is kept
between calls, so nothing can be out of date. Whatever is not exactly so gives None, and plan.py
judges it, with words. What stands here must be no more than what plan.py would let pass, and give
what its plan would: tests/peft/fused/test_straight.py changes each thing that is read, one by one.
"""

import math
import os
from typing import Any

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, float32, float64, nn, strided

from delora_kernels.bases.plain import any_module_has_hooks
from delora_kernels.call import Call
from delora_kernels.functional.straight import all_trained, straight_call, unwatched
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.plan import caches_dora_norms, methods_of

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_PLANS"

enabled = os.environ.get(ENVIRONMENT_VARIABLE) != "0"
"""Whether calls may take the straight way; with DELORA_KERNELS_PLANS=0 in the environment plan.py
judges every call.
"""

_MISSING = object()
_CALLED_BY_LORA = methods_of(LoraLinear, nn.Linear, nn.Identity, nn.Dropout)
_CALLED_BY_DORA = methods_of(DoraLinearVariant, DoraLinearLayer)
_CALLED_BY_DELORA = methods_of(DeloraLinear, nn.Linear, nn.Identity, nn.Dropout)


def read_lora(layer: Any, x: Tensor, looked: bool = False) -> Call | None:
    """Read the call of a LoRA or DoRA linear, or None where plan.py has to judge it.

    Args:
        layer: The layer.
        x: Its input.
        looked: Whether it is known that nobody watches: of a sibling whose leader was just read.
    """
    if not (looked or (enabled and unwatched(x))) or layer._disable_adapters or layer.merged_adapters:
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
    if _drops(dropouts._modules[name], layer.training if variant is not None else True):
        return None
    if not (is_plain(A_linear) and is_plain(B_linear) and is_plain(base)) or "forward" in layer.__dict__:
        return None
    if any_module_has_hooks() or _any_replaced(_CALLED_BY_LORA):
        return None
    A_tensors, B_tensors, base_tensors = A_linear._parameters, B_linear._parameters, base._parameters
    A: Any = A_tensors.get("weight")
    B: Any = B_tensors.get("weight")
    weight: Any = base_tensors.get("weight")
    bias: Any = base_tensors.get("bias", _MISSING)
    if A_tensors.get("bias", _MISSING) is not None or B_tensors.get("bias", _MISSING) is not None:
        return None
    if not _fit(x, weight, bias, A, B):
        return None
    if variant is None:
        if not all_trained(A, B):
            return None
        return straight_call(x, weight, bias, A, B, scale)
    magnitudes = parts["lora_magnitude_vector"]
    if type(variant) is not DoraLinearVariant or type(magnitudes) is not nn.ModuleDict:
        return None
    owner = magnitudes._modules.get(name)
    if type(owner) is not DoraLinearLayer or owner.fan_in_fan_out or not is_plain(owner):
        return None
    if verdicts.reasons["dora"] is not None or _any_replaced(_CALLED_BY_DORA) or caches_dora_norms(layer):
        return None
    magnitude: Any = owner._parameters.get("weight")
    if type(magnitude) is not nn.Parameter or magnitude.shape != (weight.shape[0],) or not _alike(magnitude, x):
        return None
    if not all_trained(A, B, magnitude):
        return None
    return straight_call(x, weight, bias, A, B, scale, magnitude)


def read_delora(layer: Any, x: Tensor, looked: bool = False) -> Call | None:
    """Read the call of a DeLoRA linear, or None where plan.py has to judge it; arguments as
    `read_lora`.
    """
    if not (looked or (enabled and unwatched(x))) or layer._disable_adapters or layer.merged_adapters:
        return None
    name, parts = _only(layer._active_adapter), layer._modules
    A_dict, B_dict, lams = parts["delora_A"], parts["delora_B"], parts["delora_lambda"]
    norms, dropouts, base = parts["delora_w_norm"], parts["delora_dropout"], parts["base_layer"]
    if not type(A_dict) is type(B_dict) is type(lams) is nn.ParameterDict or type(norms) is not BufferDict:
        return None
    if type(dropouts) is not nn.ModuleDict or type(base) is not nn.Linear or name not in A_dict._parameters:
        return None
    if verdicts.reasons["delora"] is not None or _drops(dropouts._modules[name], True):
        return None
    if not is_plain(base) or "forward" in layer.__dict__ or any_module_has_hooks() or _any_replaced(_CALLED_BY_DELORA):
        return None
    A: Any = A_dict._parameters[name]
    B: Any = B_dict._parameters[name]
    lam: Any = lams._parameters[name]
    norm: Any = norms._buffers[name]
    weight: Any = base._parameters.get("weight")
    bias: Any = base._parameters.get("bias", _MISSING)
    if not _fit(x, weight, bias, A, B) or layer.r[name] != A.shape[0]:
        return None
    if type(lam) is not nn.Parameter or lam.shape != (1,) or not _alike(lam, x):
        return None
    if type(norm) is not Tensor or norm.shape != (weight.shape[1],) or norm.requires_grad or not _alike(norm, x):
        return None
    if not all_trained(A, B, lam):
        return None
    return straight_call(x, weight, bias, A, B, 1.0, None, lam, norm)


def _only(active: Any) -> Any:
    """Return the name of the one active adapter, or None."""
    return active if type(active) is str else active[0] if len(active) == 1 else None


def _drops(dropout: Any, trains: bool) -> bool:
    """Whether a dropout module may do something, or is one that plan.py has to look at."""
    kind = type(dropout)
    if kind is nn.Identity:
        return not is_plain(dropout)
    if kind is not nn.Dropout or (dropout.p > 0 and dropout.training and trains):
        return True
    return dropout.inplace or not is_plain(dropout)


def is_plain(module: nn.Module) -> bool:
    """Whether calling `module` is its class's forward and no more."""
    return not (
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or "forward" in module.__dict__
    )


def _fit(x: Tensor, weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether these are whole tensors of one dtype on the CPU that belong together."""
    kind = nn.Parameter
    if not type(weight) is type(A) is type(B) is kind or type(x) not in (Tensor, kind):
        return False
    if x.dtype not in (float32, float64) or weight.requires_grad or (bias is not None and bias.requires_grad):
        return False
    if x.dim() < 2 or x.layout is not strided or x.is_nested or not _alike(weight, x):
        return False
    if not weight.dim() == A.dim() == B.dim() == 2:
        return False
    N, K = weight.shape
    if x.shape[-1] != K or not _alike(A, x) or not _alike(B, x):
        return False
    r = A.shape[0]
    if r == 0 or N == 0 or K == 0 or A.shape != (r, K) or B.shape != (N, r):
        return False
    return bias is None or (type(bias) is kind and bias.shape == (N,) and _alike(bias, x))


def _alike(tensor: Tensor, x: Tensor) -> bool:
    return tensor.dtype is x.dtype and tensor.is_cpu and x.is_cpu and tensor.layout is strided


def _any_replaced(methods: tuple[tuple[Any, str, Any], ...]) -> bool:
    """Whether somebody has put another method in the place of one that PEFT's forward calls."""
    for kind, name, method in methods:  # noqa: SIM110, a generator is another frame
        if getattr(kind, name) is not method:
            return True
    return False
