"""PEFT's adapters on the experts of expert models (`target_parameters`), fused at the outermost of
their wrappers.

PEFT wraps an experts module once for each adapted parameter, one ParamWrapper around the other.
Each builds W + s·BA of all experts at every call and puts it in W's place. Here the outermost
wrapper reads the factors of all of them, from where PEFT keeps them, and runs experts_block.py on
the module as it is: the model's choice of an experts implementation stays what it was, and its
registry is not touched. Whatever is not exactly what has been read runs PEFT's own forward.

PEFT's packing: lora_A holds (expert, rank, in) in its rows, lora_B (out; rank, expert) in its
columns.
"""

import math
from collections.abc import Iterable, Mapping
from numbers import Real
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from delora_kernels.bases.plain import any_module_has_hooks, has_other_forward, parameter, why_not_local, why_not_plain
from delora_kernels.bases.stored_experts import StoredExperts, is_stored, why_not_stored
from delora_kernels.checks import active_transform
from delora_kernels.functional.common import exporting
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.experts_block import Projection, experts_block
from delora_kernels.integrations.peft.fused.experts_known import computes_by_weight_dtype, why_not_known
from delora_kernels.integrations.peft.verdict import DISABLED, INACTIVE, MERGED, State, Verdict, log_once

_CALLED = ("forward", "_activate_lora", "get_delta_factors", "get_delta_weight", "get_param")
_DEFINED = {name: getattr(ParamWrapper, name, None) for name in _CALLED}
"""What PEFT's forward calls. Who puts another method in the place of one wants that one to run."""


class FusedParamWrapper(ParamWrapper):
    """PEFT's wrapper of a module's parameter with a fused forward, where it is the outermost one of
    an experts module.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        y: Tensor
        if exporting() and not torch.compiler.is_dynamo_compiling():
            y = ParamWrapper.forward(self, x, *args, **kwargs)
            return y
        plan = plan_of_experts(self)
        reason = plan if isinstance(plan, str) else None
        if not isinstance(plan, str):
            routing = routing_of(plan.experts, args, kwargs)
            reason = routing if isinstance(routing, str) else _why_not_call(plan, x, *routing)
            if reason is None and not isinstance(routing, str):
                return experts_block(plan.experts, plan.up, plan.down, x, *routing, plan.by_weight)
        log_once("accelerated adapters of experts run PEFT's own forward", str(reason))
        y = ParamWrapper.forward(self, x, *args, **kwargs)
        return y

    def _get_name(self) -> str:
        return "ParamWrapper"  # PEFT's layer status reads the type off the repr


class ExpertsPlan(NamedTuple):
    """What computes the experts under a wrapper.

    Args:
        experts: The module.
        up, down: Its projections, with what their adapters add.
        by_weight: As in `experts_block`.
    """

    experts: Any
    up: Projection
    down: Projection
    by_weight: bool


def verdict_of_experts(layer: Any) -> Verdict:
    """Judge how a wrapper runs as it stands, as the outermost one of its module."""
    plan = plan_of_experts(layer)
    if isinstance(plan, str):
        return Verdict(State.OWN_FORWARD, plan)
    return Verdict(State.FUSED)


def plan_of_experts(layer: Any) -> ExpertsPlan | str:
    """Find what computes the experts under their outermost wrapper, or why PEFT's own forward
    must.
    """
    reason = verdicts.against_experts[0] if verdicts.against_experts else _why_not_class()
    if reason is not None:
        return reason
    if has_other_forward(layer):
        return "it has a forward of its own"
    wrappers, experts = wrappers_of(layer)
    for wrapper in wrappers[1:]:
        reason = why_not_plain(wrapper, "wrapper inside it")
        if reason is not None:
            return reason
    reason = _why_not_experts(experts)
    if reason is not None:
        return reason
    names = ("gate_up_proj" if experts.has_gate else "up_proj", "down_proj")
    found: dict[str, Projection] = {}
    for name in names:
        projection = _projection(experts, name)
        if isinstance(projection, str):
            return projection
        found[name] = projection
    idle: list[str] = []
    adapted: set[str] = set()
    for wrapper in wrappers:
        name = wrapper.parameter_name
        if name not in found or name in adapted:
            return f"its parameter {name} is " + ("wrapped twice" if name in adapted else "no weight of the experts")
        adapted.add(name)
        factors = _factors(wrapper, found[name].weight, experts.is_transposed)
        if isinstance(factors, str):
            if factors not in (DISABLED, MERGED, INACTIVE):
                return factors
            idle.append(factors)
        else:
            found[name] = found[name]._replace(A=factors[0], B=factors[1], scale=factors[2])
    if len(idle) == len(wrappers):
        return idle[0]
    return ExpertsPlan(experts, found[names[0]], found[names[1]], computes_by_weight_dtype(experts))


def wrappers_of(layer: nn.Module) -> tuple[list[Any], Any]:
    """Return a wrapper and those inside it, from the outside, and the module that they wrap."""
    wrappers: list[Any] = []
    module: Any = layer
    while type(module) in (ParamWrapper, FusedParamWrapper):
        wrappers.append(module)
        module = module._modules["base_layer"]
    return wrappers, module


def outermost(layers: Iterable[nn.Module]) -> dict[nn.Module, nn.Module]:
    """Return each wrapper of a parameter → the outermost one around it.

    Args:
        layers: The adapter layers of a model, each before those inside it.
    """
    found: dict[nn.Module, nn.Module] = {}
    for layer in layers:
        if type(layer) in (ParamWrapper, FusedParamWrapper) and layer not in found:
            found |= dict.fromkeys(wrappers_of(layer)[0], layer)
    return found


def _why_not_class() -> str | None:
    """Say which method of PEFT's wrapper has been replaced, or None."""
    for name, method in _DEFINED.items():
        if getattr(ParamWrapper, name, None) is not method:
            return f"lora.layer.ParamWrapper.{name} has been replaced"
    return None


def _why_not_experts(experts: Any) -> str | None:
    """Say why a wrapped module is not to be computed by the block, or None."""
    if "parametrizations" in experts._modules:
        kinds = sorted({type(each).__name__ for held in experts.parametrizations.values() for each in held})
        if kinds == ["Bnb4bitParametrization"]:
            return "its weights are bitsandbytes' parametrizations: load them in 16 bits and call quantize_experts"
        return "its module is parametrized (by a wrapper around it, which runs PEFT's own forward)"
    reason = why_not_known(experts) or why_not_plain(experts, "experts module")
    if reason is None and any_module_has_hooks():
        return "hooks are registered for all modules"
    return reason


def _projection(experts: Any, name: str) -> Projection | str:
    """Return a projection without its adapter, or what its tensors have against it."""
    weight, bias = parameter(experts, name), parameter(experts, f"{name}_bias") if experts.has_bias else None
    packed = is_stored(weight)
    reason = why_not_stored(weight, name) if packed else None
    if reason is not None:
        return reason
    for tensor, what, dims in ((weight, name, 3), (bias, f"{name}_bias", 2)):
        if tensor is None or (packed and tensor is weight):
            continue
        reason = why_not_local(tensor, what)
        if reason is not None:
            return reason
        if tensor.dim() != dims:
            return f"its {what} is {tensor.dim()}-dimensional"
    if weight.shape[0] != experts.num_experts or weight.shape[0] == 1:
        return f"its {name} is of {weight.shape[0]} experts, of {experts.num_experts}"
    if packed:
        return Projection(StoredExperts(weight, experts.is_transposed), bias)
    return Projection(weight.mT if experts.is_transposed else weight, bias)


def _factors(wrapper: Any, weight: Any, is_transposed: bool) -> tuple[Tensor, Tensor, float] | str:
    """Return A [E, r, K], B [E, N, r] and the scale of a wrapper's active adapters, stacked where
    they are several, in the weight's dtype; or why there are none.
    """
    if wrapper._disable_adapters:
        return "its adapters are disabled, and merged" if wrapper.merged_adapters else DISABLED
    if wrapper.merged_adapters:
        return MERGED
    parts = wrapper._modules
    for role in ("lora_A", "lora_B"):
        if type(parts[role]) is not nn.ModuleDict:
            return f"its {role} is kept in a {type(parts[role]).__name__}"
    names = [name for name in wrapper.active_adapters if name in parts["lora_A"]]
    if not names:
        return INACTIVE
    if getattr(wrapper, "_did_swap_in_out_features", is_transposed) is bool(is_transposed):
        return "its in and out features are not those of its module"  # PEFT would put the update the other way round
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for name in names:
        pair = _pair(wrapper, parts, name, weight)
        if isinstance(pair, str):
            return pair
        pairs.append(pair)
    if len(pairs) == 1:
        return pairs[0]
    with torch.autocast(weight.device.type, enabled=False):
        return torch.cat([A for A, _, _ in pairs], 1), torch.cat([B * scale for _, B, scale in pairs], 2), 1.0


def _pair(wrapper: Any, parts: Mapping[str, Any], name: str, weight: Any) -> tuple[Tensor, Tensor, float] | str:
    """One adapter's factors by expert, as PEFT packs them."""
    if wrapper.lora_variant.get(name) is not None or wrapper.lora_bias.get(name):
        return "its adapter is more than a pair of factors"
    factors = []
    for role in ("lora_A", "lora_B"):
        owner = parts[role]._modules[name]
        if type(owner) is not nn.Linear:
            return f"its {role} is a {type(owner).__name__}"
        factor = parameter(owner, "weight")
        reason = why_not_local(factor, role)
        if reason is not None:
            return reason
        if factor.dim() != 2 or factor.device != weight.device:
            return f"its {role} is on another device than its base, or no matrix"
        factors.append(factor)
    (A, B), (E, N, K) = factors, weight.shape
    r = A.shape[0] // E
    if A.shape != (r * E, K) or B.shape != (N, r * E):
        return "its factors do not fit the experts' weights"
    scale = wrapper.scaling[name]
    if not isinstance(scale, Real) or not -math.inf < float(scale) < math.inf:
        return "its scaling is not a finite number"
    # as PEFT: the update has the weight's dtype
    return A.view(E, r, K).to(weight.dtype), B.view(N, r, E).permute(2, 0, 1).to(weight.dtype), float(scale)


def routing_of(experts: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, Tensor] | str:
    """Return chosen experts and weights, by place or by the names that the module gives them."""
    names = type(experts).forward.__wrapped__.__code__.co_varnames[2:4]
    given = dict(zip(names, args, strict=False)) | {name: kwargs[name] for name in names if name in kwargs}
    if len(args) + len(kwargs) != 2 or len(given) != 2:
        return f"it is called with {', '.join([*map(str, kwargs), f'{1 + len(args)} positional arguments'])}"
    return given[names[0]], given[names[1]]


def _why_not_call(plan: ExpertsPlan, x: Any, chosen: Any, weights: Any) -> str | None:
    """Say why this call needs PEFT's own forward, or None."""
    for value, what in ((x, "hidden states"), (chosen, "chosen experts"), (weights, "weights")):
        if type(value) not in (Tensor, nn.Parameter):
            return f"its {what} are a {type(value).__name__}"
        if value.dim() != 2:
            return f"its {what} are {value.dim()}-dimensional"
        if value.device != plan.up.weight.device:
            return f"its {what} are on another device"
    if (
        chosen.shape != weights.shape
        or chosen.shape[0] != x.shape[0]
        or chosen.shape[1] == 0
        or (x.shape[1] != plan.up.weight.shape[2])
    ):
        return "its chosen experts and weights are not those of its hidden states"
    tensors = [x, weights, *(each for each in (*plan.up[:4], *plan.down[:4]) if isinstance(each, Tensor))]
    transform = active_transform(tensors)
    if transform is not None:
        return f"{transform} are under way"
    if x.dtype != plan.up.weight.dtype and not plan.by_weight and not torch.is_autocast_enabled(x.device.type):
        return f"its input is {x.dtype}, its base {plan.up.weight.dtype}"
    return None
