"""What computes a PEFT layer as it stands now: a fused function of its tensors, or why PEFT's own
forward must.
"""

import math
import sys
from collections.abc import Callable, Mapping
from functools import partial
from numbers import Real
from typing import Any, NamedTuple

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora import dora
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delora_kernels import functional
from delora_kernels.bases.plain import (
    NotLocal,
    PlainBase,
    any_module_has_hooks,
    has_other_forward,
    parameter,
    parameters_of,
    why_not_local,
    why_not_plain,
)
from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import Broken, StoredBase
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.beside_base import (
    BesideRun,
    as_they_are,
    beside,
    stack,
    sum_of_biases,
)
from delora_kernels.integrations.peft.fused.one_by_one import run_one_by_one
from delora_kernels.integrations.peft.fused.one_call import PlannedRun
from delora_kernels.integrations.peft.fused.stored_bases import (
    StoredRun,
    class_with_forward,
    peft_class_on_stored_base,
    why_not_peft,
)
from delora_kernels.integrations.peft.fused.variants import DORA, KINDS, LORA, plan_of_variant
from delora_kernels.integrations.peft.verdict import DISABLED, INACTIVE, MERGED, State, Verdict

Fused = Callable[[Tensor], Tensor]
Base = PlainBase | StoredBase

_LORA_DICTS: dict[str, type] = dict.fromkeys(("lora_A", "lora_B", "lora_dropout"), nn.ModuleDict)
_DELORA_DICTS: dict[str, type] = dict.fromkeys(("delora_A", "delora_B", "delora_lambda"), nn.ParameterDict)
_DELORA_DICTS |= {"delora_w_norm": BufferDict, "delora_dropout": nn.ModuleDict}
"""Where PEFT keeps the parts of a layer's adapters; a wrapper in the place of one may do more."""


def _as_defined(kind: Any, name: str) -> Any:
    """Return the method that the class's own module defines, or None if another has taken its place
    already.
    """
    method = getattr(kind, name, None)
    return method if getattr(method, "__globals__", None) is vars(sys.modules[kind.__module__]) else None


_CALLED: dict[Any, tuple[str, ...]] = dict.fromkeys((LoraLinear, DeloraLinear, nn.Linear, Conv1D), ("forward",))
_CALLED |= dict.fromkeys((nn.Dropout, nn.Identity, DoraLinearVariant), ("forward",))
_CALLED |= {DoraLinearLayer: ("forward", "get_weight_norm")}
_DEFINED = {kind: {name: _as_defined(kind, name) for name in names} for kind, names in _CALLED.items()}
"""What PEFT's forward calls, by class. Who puts another method in the place of one wants that one
to run.
"""


class Adapter(NamedTuple):
    """One active adapter of a layer.

    Args:
        owners: Role → the module that holds its tensor; DeLoRA's tensors stand in dictionaries of
            the layer instead.
        tensors: Role → tensor.
        dropout: The module.
        scale: Factor of its update.
        dropout_p: What `dropout` drops with now.
        rank: What PEFT's forward divides by, if it does.
        plan: Of a variant that stands for a whole layer: (adapter, base) → its plan.
    """

    owners: Mapping[str, nn.Module]
    tensors: Mapping[str, Tensor]
    dropout: nn.Module
    scale: float
    dropout_p: float
    rank: int | None = None
    plan: Callable[[Any, Any], Fused | str] | None = None


def verdict_of(layer: Any) -> Verdict:
    """Judge how an adapter layer runs as it stands: a linear of PEFT's, fused or not, or a layer of
    this library.
    """
    own = getattr(type(layer), "verdict", None)
    if own is not None:
        verdict: Verdict = own(layer)
        return verdict
    plan = plan_of(layer)
    if isinstance(plan, BesideRun):
        return Verdict(State.RANK_TERM, plan.reason, plan)
    return Verdict(State.OWN_FORWARD, plan) if isinstance(plan, str) else Verdict(State.FUSED, None, plan)


def plan_of(layer: Any) -> Fused | str:
    """Find what computes the layer's output from its input x, or the reason why it must be PEFT's
    own forward.

    It runs at every call: submodules and parameters are read from their dictionaries, which costs a
    fifth of what attributes of a module do.

    Args:
        layer: A LoRA or DeLoRA linear of PEFT, fused or not.
    """
    reason = why_not_layer(layer)
    if reason is not None:
        return reason
    is_delora, parts = isinstance(layer, DeloraLinear), layer._modules
    known = parts["delora_A" if is_delora else "lora_A"]
    names = [name for name in layer.active_adapters if name in known]
    if not names:
        return INACTIVE
    adapters: list[Adapter] = []
    for name in names:
        adapter = _delora_adapter(layer, name) if is_delora else lora_adapter(layer, name)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    return why_not_base_class(layer) or _plan(layer, parts["base_layer"], adapters)


def why_not_base_class(layer: nn.Module) -> str | None:
    """Say which method of the base's class that PEFT's forward calls has been replaced, or None."""
    kind = type(layer._modules["base_layer"])
    return why_not_class(kind) if kind in _DEFINED else None


def why_not_layer(layer: Any) -> str | None:
    """Say what a layer's class, its state and where it keeps its adapters have against a fused run,
    or None.
    """
    is_delora = isinstance(layer, DeloraLinear)
    reason = verdicts.reasons["delora" if is_delora else "lora"]
    if isinstance(layer, LoraLinear | DeloraLinear):
        reason = reason or why_not_class(DeloraLinear if is_delora else LoraLinear)
    else:
        reason = reason or why_not_peft() or why_not_class(class_with_forward(peft_class_on_stored_base(type(layer))))
    if reason is not None:
        return reason
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    parts = layer._modules
    for role, kind in (_DELORA_DICTS if is_delora else _LORA_DICTS).items():
        if type(parts[role]) is not kind:
            return f"its {role} is kept in a {type(parts[role]).__name__}"
    return None


def _plan(layer: nn.Module, base_layer: nn.Module, adapters: list[Adapter]) -> Fused | str:
    """Plan a layer whose own settings allow it, or say what the modules and tensors that it reads
    have against it.
    """
    if has_other_forward(layer):
        return "it has a forward of its own"
    base = base_in(base_layer)
    if isinstance(base, NotLocal | Broken):
        return base
    is_delora = isinstance(layer, DeloraLinear)
    reason = why_not_adapters(adapters, base) or _why_not_variants(layer, adapters, base)
    if isinstance(base, str):
        return base if reason is not None or any_module_has_hooks() else beside(adapters, base_layer, is_delora, base)
    if reason is not None:
        return reason
    plan = _delora_plan(adapters, base) if is_delora else _lora_plan(adapters, base)
    if isinstance(base, StoredBase) and not isinstance(plan, str):
        return StoredRun(base, plan, partial(beside, adapters, base_layer, is_delora))
    return plan


def _why_not_variants(layer: Any, adapters: list[Adapter], base: Base | str) -> str | None:
    """Say why a variant that stands for a whole layer is not planned, or None."""
    if len(adapters) == 1 and not isinstance(base, str):
        return None
    others = "a base that runs its own forward" if len(adapters) == 1 else "other adapters"
    for name in layer.active_adapters if any(adapter.plan is not None for adapter in adapters) else ():
        variant = layer.lora_variant.get(name)
        if KINDS.get(type(variant), LORA) not in (LORA, DORA):
            return f"its LoRA variant {type(variant).__name__} is not fused beside {others}"
    return None


def why_not_adapters(adapters: list[Adapter], base: Base | str) -> str | None:
    """Say what the modules and tensors of the adapters have against a plan, or None; puts the
    tensors where they are looked for.
    """
    for index, adapter in enumerate(adapters):
        for role, owner in adapter.owners.items():
            reason = why_not_plain(owner, role)
            if reason is not None:
                return reason
            if role != "magnitude" and parameter(owner, "bias") is not None:
                if role == "lora_A" or "magnitude" in adapter.owners:
                    return f"its {role} has a bias"
        if why_not_plain(adapter.dropout, "dropout") is not None:
            return f"its dropout is a {type(adapter.dropout).__name__} that can't be fused"
        if adapter.owners:
            tensors, own = parameters_of(adapter.owners, "weight"), parameter(adapter.owners["lora_B"], "bias")
            tensors |= {} if own is None else {"lora_bias": own}
            adapter = adapters[index] = adapter._replace(tensors=tensors)
        for role, tensor in adapter.tensors.items():
            reason = why_not_local(tensor, role)
            if reason is not None:
                return reason
            if tensor.dim() != (2 if role.endswith(("_A", "_B")) else 1):
                return NotLocal(f"its {role} is {tensor.dim()}-dimensional (sharded away)")
            if not isinstance(base, str) and tensor.device != base.device:
                return f"its {role} is on another device than its base"
        if adapter.rank is not None and adapter.rank != adapter.tensors["delora_A"].shape[0]:
            return "its rank is not that of delora_A"
    return None


def methods_of(*kinds: Any) -> tuple[tuple[Any, str, Any], ...]:
    """Return what PEFT's forward calls of these classes: class, name, method as it is defined."""
    return tuple((kind, name, method) for kind in kinds for name, method in _DEFINED[kind].items())


def why_not_class(kind: Any) -> str | None:
    """Say which method of a class that PEFT's forward calls has been replaced, or None."""
    if kind not in _DEFINED:  # of a library that need not be there
        _DEFINED[kind] = {"forward": _as_defined(kind, "forward")}
    for name, method in _DEFINED[kind].items():
        if getattr(kind, name) is not method:
            return f"{class_name(kind)}.{name} has been replaced"
    return None


def class_name(kind: type) -> str:
    """Return a layer's class as messages name it."""
    return f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__}"


def lora_adapter(layer: Any, name: str) -> Adapter | str:
    """Read an adapter of a LoRA layer, or say what its own settings have against a fused run."""
    parts = layer._modules
    variant = layer.lora_variant.get(name)
    kind = LORA if variant is None else KINDS.get(type(variant))
    if kind is None:
        return f"its LoRA variant {type(variant).__name__} is not fused"
    if not layer.cast_input_dtype_enabled:
        return "the cast of its input is disabled"
    owners = {"lora_A": parts["lora_A"]._modules[name], "lora_B": parts["lora_B"]._modules[name]}
    for role, owner in owners.items():
        if type(owner) is not nn.Linear:
            return f"its {role} is a {type(owner).__name__}"
    if variant is not None and kind != DORA:
        reason = why_not_peft("variants of LoRA") or why_not_class(type(variant))
        if reason is not None:
            return reason
    if kind == DORA:
        reason = verdicts.reasons["dora"]
        if reason is not None:
            return reason
        owners["magnitude"] = parts["lora_magnitude_vector"]._modules[name]
        if type(owners["magnitude"]) is not DoraLinearLayer:
            return f"its magnitude is a {type(owners['magnitude']).__name__}"
        if bool(owners["magnitude"].fan_in_fan_out) is not isinstance(parts["base_layer"], Conv1D):
            return "its fan_in_fan_out is not that of its base"  # PEFT then takes the norm along the other axis
        reason = why_not_class(DoraLinearVariant)
        if reason is not None:
            return reason
        if caches_dora_norms(layer):
            return "PEFT's cache of DoRA norms is on"
    for owner in owners.values():
        reason = why_not_class(type(owner))
        if reason is not None:
            return reason
    dropout = parts["lora_dropout"]._modules[name]
    dropout_p = _dropout_p(dropout)
    if isinstance(dropout_p, str):
        return dropout_p
    if kind == DORA and not layer.training:
        dropout_p = 0.0  # PEFT's DoRA asks the layer, not its dropout, whether it trains
    scale = layer.scaling[name]
    if not isinstance(scale, Real):
        return f"its scaling is a {type(scale).__name__}"
    if not -math.inf < float(scale) < math.inf:  # math.isfinite does not trace
        return "its scaling is not finite"
    plan = None if kind in (LORA, DORA) else partial(plan_of_variant, kind, layer, name)
    return Adapter(owners, {}, dropout, float(scale), dropout_p, plan=plan)


def caches_dora_norms(layer: nn.Module) -> bool:
    """Whether PEFT (≥ 0.19) would take a norm that it has kept."""
    return bool(getattr(dora, "ENABLE_DORA_CACHING", False)) and not layer.training


def _delora_adapter(layer: Any, name: str) -> Adapter | str:
    parts, tensors = layer._modules, {}
    for role in ("delora_A", "delora_B", "delora_lambda"):
        tensors[role] = parameter(parts[role], name)
    tensors["delora_w_norm"] = parts["delora_w_norm"]._buffers[name]
    if tensors["delora_w_norm"].requires_grad:
        return "its delora_w_norm requires a gradient"
    dropout = parts["delora_dropout"]._modules[name]
    dropout_p = _dropout_p(dropout)
    return dropout_p if isinstance(dropout_p, str) else Adapter({}, tensors, dropout, 1.0, dropout_p, layer.r[name])


def _lora_plan(adapters: list[Adapter], base: Base) -> Fused | str:
    if len(adapters) > 1:
        if any("magnitude" in adapter.tensors for adapter in adapters):
            return why_not_peft("several adapters with a DoRA among them") or partial(run_one_by_one, adapters, base)
        return partial(_with_bias, partial(_stacked, as_they_are, adapters, base), adapters, {"bias": base.bias})
    adapter, tensors = adapters[0], adapters[0].tensors
    if adapter.plan is not None:
        return adapter.plan(adapter, base)
    arguments: dict[str, Any] = {"weight": base.weight, "A": tensors["lora_A"], "B": tensors["lora_B"]}
    arguments.update(scale=adapter.scale, bias=base.bias, dropout_p=adapter.dropout_p)
    if "magnitude" in tensors:
        return partial(functional.dora_linear, magnitude=tensors["magnitude"], **arguments)
    if "lora_bias" in tensors:
        return why_not_peft("adapters with a bias") or partial(_with_bias, functional.lora_linear, adapters, arguments)
    return PlannedRun(functional.lora_linear, functional.CALLS["lora_linear"], arguments)


def _delora_plan(adapters: list[Adapter], base: Base) -> Fused:
    if len(adapters) > 1:
        return partial(_stacked_delora, adapters, base)
    (A, B, lam, weight_norm), dropout_p = adapters[0].tensors.values(), adapters[0].dropout_p
    arguments = {"weight": base.weight, "A": A, "B": B, "lam": lam, "weight_norm": weight_norm}
    arguments |= {"bias": base.bias, "dropout_p": dropout_p}
    return PlannedRun(functional.delora_linear, functional.CALLS["delora_linear"], arguments, keeps_dtype=True)


def _stacked_delora(adapters: list[Adapter], base: Base, x: Tensor) -> Tensor:
    y = _stacked(functional.delora_factors, adapters, base, x, bias=base.bias)
    return y.to(x.dtype)  # as PEFT's DeLoRA under autocast


def _with_bias(
    function: Callable[..., Tensor], adapters: list[Adapter], arguments: Mapping[str, Any], x: Tensor
) -> Tensor:
    """Run LoRA whose lora_B may have a bias: scale · bias is one term more of the base's."""
    return function(x, **{**arguments, "bias": sum_of_biases(adapters, arguments["bias"])})


def _stacked(
    factors: Callable[..., Any], adapters: list[Adapter], base: Base, x: Tensor, *, bias: Tensor | None
) -> Tensor:
    """Several adapters as one of their summed rank, each with its own mask; x is read once."""
    A, B, scale = stack(factors, adapters)
    return functional.lora_linear(
        x,
        base.weight,
        A,
        B,
        scale,
        bias,
        dropout_p=[adapter.dropout_p for adapter in adapters],
        ranks=[next(iter(adapter.tensors.values())).shape[0] for adapter in adapters],
    )


def _dropout_p(dropout: Any) -> float | str:
    """Return the probability that `dropout` drops with now, or why it can't be said."""
    kind = type(dropout)
    if kind not in (nn.Identity, nn.Dropout):
        return f"its dropout is a {kind.__name__} that can't be fused"
    reason = why_not_class(kind)
    if reason is not None:
        return reason
    if kind is nn.Identity:
        return 0.0
    if dropout.inplace:
        return "its dropout writes into its input"
    if dropout.p >= 1:
        return "its dropout drops everything"
    return dropout.p if dropout.training else 0.0
