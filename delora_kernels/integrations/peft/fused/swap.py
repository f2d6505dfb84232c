"""accelerate() and restore(): find the adapter layers of a model, swap their classes, report."""

from collections.abc import Iterator, Sequence
from typing import Any

from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from delora_kernels.bases.plain import NotLocal
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.convolution import CONVOLUTIONS, is_dora, verdict_of_convolution
from delora_kernels.integrations.peft.fused.experts import outermost, verdict_of_experts
from delora_kernels.integrations.peft.fused.grouping import Groups, check_groups, move_out, settle_in
from delora_kernels.integrations.peft.fused.layers import (
    fused_class,
    peft_class,
    swap_class,
)
from delora_kernels.integrations.peft.fused.plan import class_name, verdict_of
from delora_kernels.integrations.peft.fused.report import LayerReport, Report
from delora_kernels.integrations.peft.fused.stored_bases import lora_linear_of
from delora_kernels.integrations.peft.verdict import State


def accelerate(model: nn.Module, strict: bool = False, *, group: bool | Sequence[Sequence[str]] = True) -> Report:
    """Make PEFT's LoRA, rsLoRA, DoRA and DeLoRA layers on nn.Linear and Transformers' Conv1D, its
    LoRA and DoRA layers on convolutions, and its LoRA adapters on the experts of expert models, run
    fused, in place.

    Outputs, gradients, parameters, state dict and PEFT's methods stay what they were; the numbers
    differ by rounding. Calling it again is harmless, and brings in layers that were added since.

    Args:
        model: Any module that holds PEFT adapter layers: a PeftModel, a bare model with injected
            adapters, one layer.
        strict: Raise, before anything is changed, unless every adapter layer can be fused. Layers
            that FSDP has sharded already can't be judged, and do not raise: every rank must decide
            alike.
        group: Whether siblings that are given the same tensor (q, k, v; gate, up) run as one call:
            x is read once for all their A, and its gradient is one buffer. Which they are is seen
            in the first forward pass; `report.groups` of an earlier run, given back, holds from the
            first call on.

    Returns:
        The report: each adapter layer, fused or with the reason why not all of it is.

    Raises:
        TypeError: `model` is not a module, or `group` no bool and no lists of names.
        ValueError: `model` has no PEFT adapter layer, or `group` names something else than fused
            layers, or a layer twice.
        RuntimeError: `strict` and a layer can't be fused; the text is the report.
    """
    layers = _adapter_layers(model, "accelerate")
    if not layers:
        raise ValueError(
            f"accelerate: model must hold PEFT adapter layers, got a {type(model).__name__} without any; "
            "wrap it with peft.get_peft_model first (prompt-learning methods have no adapter layers)"
        )
    groups = Groups({layer: name for name, layer in layers})
    outer = outermost(layer for _, layer in layers)
    report = Report(tuple(_describe(name, layer, outer.get(layer)) for name, layer in layers), groups)
    if strict and report.declined:
        raise RuntimeError(f"accelerate: strict=True, but not every adapter layer can be fused: {report}")
    fused = {
        name: layer for name, layer in layers if peft_class(fused_class(type(layer))) is not fused_class(type(layer))
    }
    check_groups(group, fused)
    fresh = [name for name, layer in fused.items() if fused_class(type(layer)) is not type(layer)]
    for layer in fused.values():
        swap_class(layer, fused_class(type(layer)))
    settle_in(fused, fresh, group)
    return report


def restore(model: nn.Module) -> int:
    """Undo accelerate(): give every fused layer PEFT's own class back, in place.

    Returns:
        The number of layers restored.

    Raises:
        TypeError: `model` is not a module.
    """
    fused = [layer for _, layer in _adapter_layers(model, "restore") if peft_class(type(layer)) is not type(layer)]
    for layer in fused:
        swap_class(layer, peft_class(type(layer)))
        move_out(layer)
    return len(fused)


def _adapter_layers(model: nn.Module, function: str) -> list[tuple[str, nn.Module]]:
    if not isinstance(model, nn.Module):
        raise TypeError(f"{function}: model must be a torch.nn.Module, got {type(model).__name__}; pass the PEFT model")
    modules: Iterator[tuple[str, nn.Module]] = model.named_modules()
    return [(name, module) for name, module in modules if isinstance(module, BaseTunerLayer)]


def _describe(name: str, layer: Any, outer: nn.Module | None) -> LayerReport:
    """Describe a layer; `outer` is the outermost wrapper of the experts that it adapts."""
    kind = type(layer)
    own = getattr(kind, "fused_method", None)  # of a layer of this library, which runs fused of itself
    method: str = own or _method(layer)
    known = fused_class(kind) is not kind or peft_class(kind) is not kind
    if own is None and not known:
        return LayerReport(name, method, f"{class_name(kind)} layers are not fused", state=State.OWN_FORWARD)
    judge = verdict_of_convolution if isinstance(layer, CONVOLUTIONS) else verdict_of
    state, reason, _ = judge(layer) if outer is None else verdict_of_experts(outer)
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in layer.modules())
    if isinstance(reason, NotLocal) and managed:
        return LayerReport(name, method, _SHARDED, deferred=True, state=state)
    return LayerReport(name, method, reason, state=state)


_SHARDED = "FSDP holds its weights in shards: calls see them whole, and decide then"


def _method(layer: Any) -> str:
    if isinstance(layer, DeloraLinear):
        return "delora"
    if isinstance(layer, ParamWrapper):
        return "expert lora"
    if isinstance(layer, CONVOLUTIONS):
        return "dora" if is_dora(layer) else "lora"
    if not lora_linear_of(layer):
        return class_name(type(layer))
    if verdicts.reasons["lora"] is not None:  # an untested PEFT, whose layer may lack what tells them apart
        return "lora"
    names = [name for name in layer.active_adapters if name in layer.lora_A.keys()]  # noqa: SIM118, it may be wrapped
    return "dora" if any(isinstance(layer.lora_variant.get(name), DoraLinearVariant) for name in names) else "lora"
