"""accelerate() and restore(): find the adapter layers of a model, swap their classes, report."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import Embedding, MultiheadAttention, ParamWrapper
from peft.tuners.lora.variants import DoraLinearVariant
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from delora_kernels.bases.plain import NotLocal
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.bypassed import MULTIHEAD_ATTENTION, why_bypassed
from delora_kernels.integrations.peft.fused.convolution import CONVOLUTIONS, verdict_of_convolution
from delora_kernels.integrations.peft.fused.embedding import verdict_of_embedding
from delora_kernels.integrations.peft.fused.experts import outermost, verdict_of_experts
from delora_kernels.integrations.peft.fused.grouping import Groups, check_groups, move_out, settle_in
from delora_kernels.integrations.peft.fused.layers import (
    fused_class,
    peft_class,
    swap_class,
)
from delora_kernels.integrations.peft.fused.other_adapters import other_adapters
from delora_kernels.integrations.peft.fused.plan import class_name, verdict_of
from delora_kernels.integrations.peft.fused.proving import backend_of, calls_by_layer, is_in_a_graph, prove_kernels
from delora_kernels.integrations.peft.fused.report import LayerReport, Report
from delora_kernels.integrations.peft.fused.stored_bases import lora_linear_of
from delora_kernels.integrations.peft.verdict import State, Verdict


def accelerate(
    model: nn.Module,
    strict: bool = False,
    *,
    group: bool | Sequence[Sequence[str]] = True,
    prove: bool | None = None,
) -> Report:
    """Make PEFT's LoRA, rsLoRA, DoRA and DeLoRA layers on nn.Linear and Transformers' Conv1D, its
    LoRA and DoRA layers on convolutions and embeddings, and its LoRA adapters on the experts of
    expert models, run fused, in place.

    Outputs, gradients, parameters, state dict and PEFT's methods stay what they were; the numbers
    differ by rounding. Calling it again is harmless, and brings in layers that were added since.

    Args:
        model: Any module that holds PEFT adapter layers: a PeftModel, a bare model with injected
            adapters, one layer.
        strict: Raise, before anything is changed, unless every adapter layer can be fused and the
            kernels that are proved are right. Layers that FSDP has sharded already can't be judged,
            and do not raise: every rank must decide alike.
        group: Whether siblings that are given the same tensor (q, k, v; gate, up) run as one call:
            x is read once for all their A, and its gradient is one buffer. Which they are is seen
            in the first forward pass; `report.groups` of an earlier run, given back, holds from the
            first call on.
        prove: Whether the kernels that the layers will call prove themselves now, with a bar, and
            not in the first training call; under the autocast around this call. None: where an
            automatic choice would take kernels, on a GPU; the ranks of a distributed run, which
            must all come here then, take the weakest result of all. True: also those of a backend
            that was asked for, which runs whatever comes of it. False: no.

    Returns:
        The report: each adapter layer, fused or with the reason why not all of it is; other
        libraries' adapters by name, none of which is fused.

    Raises:
        TypeError: `model` is not a module, `group` no bool and no lists of names, or `prove` no
            bool and not None.
        ValueError: `model` has no adapter layer, or `group` names something else than fused
            layers, or a layer twice.
        RuntimeError: `strict` and a layer can't be fused, or kernels failed; the text is the
            report.
    """
    if prove is not None and not isinstance(prove, bool):
        raise TypeError(f"accelerate: prove must be True, False or None, got {type(prove).__name__}; leave it out")
    report, fused = _judged(model, "accelerate", prove)
    if strict and report.declined:
        raise RuntimeError(f"accelerate: strict=True, but not every adapter layer can be fused: {report}")
    if strict and any(proof.reason is not None for proof in report.proofs):
        raise RuntimeError(f"accelerate: strict=True, but kernels failed when they proved themselves: {report}")
    check_groups(group, {name for name, layer in fused.items() if hasattr(fused_class(type(layer)), "read_plan")})
    fresh = [name for name, layer in fused.items() if fused_class(type(layer)) is not type(layer)]
    for layer in fused.values():
        swap_class(layer, fused_class(type(layer)))
    settle_in(fused, fresh, group)
    return report


def warmup(model: nn.Module, strict: bool = False) -> Report:
    """Let the kernels that an accelerated model will call prove themselves now, under the autocast
    around this call, and ask again for those that found no memory before.

    accelerate() does this already. It is of use once more where autocast is on in training alone,
    or memory was short. Call it between two steps, never between a forward pass and its backward
    pass; on every rank of a distributed run, for they take the weakest result of all.

    Args:
        model: Holds PEFT adapter layers, accelerated or not.
        strict: Raise if kernels failed.

    Returns:
        The report, as accelerate() gives it.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no PEFT adapter layer.
        RuntimeError: this is a backward pass, or a CUDA graph is being captured; or `strict` and
            kernels failed, and the text is the report.
    """
    if is_in_a_graph():
        raise RuntimeError(
            "warmup: kernels can't prove themselves in a backward pass or while a CUDA graph is captured; call it "
            "before the first step"
        )
    report, _ = _judged(model, "warmup", True)
    if strict and any(proof.reason is not None for proof in report.proofs):
        raise RuntimeError(f"warmup: strict=True, but kernels failed when they proved themselves: {report}")
    return report


def _judged(model: nn.Module, function: str, prove: bool | None) -> tuple[Report, dict[str, nn.Module]]:
    """Judge every adapter layer and prove its kernels → the report, and the layers that are or can
    be swapped by name.
    """
    layers = _adapter_layers(model, function)
    others = tuple(
        LayerReport(name, kind, _of_another_library(kind), state=State.OWN_FORWARD)
        for name, kind in other_adapters(model)
    )
    if not others:
        _check_some(layers, model, function)
    groups = Groups({layer: name for name, layer in layers})
    outer = outermost(layer for _, layer in layers)
    parents = _parents(model)
    described = {name: _describe(name, layer, outer.get(layer), parents.get(layer)) for name, layer in layers}
    judged = {name: (layer, described[name][1]) for name, layer in layers}
    calls = calls_by_layer(judged, outer)
    device = next((p.device.type for p in model.parameters()), "cpu")
    proofs = () if prove is False else prove_kernels(calls.values(), device, bool(prove))
    found = tuple(
        replace(each, backend=backend_of(verdict, calls[name])) for name, (each, verdict) in described.items()
    )
    fused = {
        name: layer for name, layer in layers if peft_class(fused_class(type(layer))) is not fused_class(type(layer))
    }
    return Report(found + others, groups, proofs), fused


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


def _some_adapter_layers(model: nn.Module, function: str) -> list[tuple[str, nn.Module]]:
    layers = _adapter_layers(model, function)
    _check_some(layers, model, function)
    return layers


def _check_some(layers: Sequence[Any], model: nn.Module, function: str) -> None:
    if layers:
        return
    raise ValueError(
        f"{function}: model must hold PEFT adapter layers, got a {type(model).__name__} without any; "
        "wrap it with peft.get_peft_model first (prompt-learning methods have no adapter layers)"
    )


def _of_another_library(kind: str) -> str | None:
    """Say why another library's adapter is left alone."""
    return f"it is computed by another library's adapter, {kind}: PEFT's alone are fused"


def described(model: nn.Module, function: str) -> list[tuple[LayerReport, nn.Module]]:
    """Describe every adapter layer of a model, which is not changed."""
    layers = _some_adapter_layers(model, function)
    outer = outermost(layer for _, layer in layers)
    return [(_describe(name, layer, outer.get(layer), None)[0], layer) for name, layer in layers]


def _parents(model: nn.Module) -> dict[nn.Module, nn.Module]:
    """Return each module's parent."""
    return {child: parent for parent in model.modules() for child in parent.children()}


def _describe(name: str, layer: Any, outer: nn.Module | None, parent: nn.Module | None) -> tuple[LayerReport, Verdict]:
    """Describe a layer, and say how it runs; `outer` is the outermost wrapper of the experts that
    it adapts.
    """
    kind = type(layer)
    own = getattr(kind, "fused_method", None)  # of a layer of this library, which runs fused of itself
    method: str = own or _method(layer)
    known = fused_class(kind) is not kind or peft_class(kind) is not kind
    if own is None and not known:
        verdict = Verdict(State.OWN_FORWARD, _unknown(kind))
    elif outer is not None:
        verdict = verdict_of_experts(outer)
    else:
        verdict = _judge(layer)(layer)
    bypassed = why_bypassed(parent, name.rpartition(".")[2])
    if bypassed is not None:
        verdict = Verdict(State.OWN_FORWARD, bypassed)
    managed = any(getattr(module, "_is_fsdp_managed_module", False) for module in layer.modules())
    if isinstance(verdict.reason, NotLocal) and managed:
        return LayerReport(name, method, _SHARDED, deferred=True, state=verdict.state), verdict
    return LayerReport(name, method, verdict.reason, state=verdict.state), verdict


def _judge(layer: nn.Module) -> Callable[[Any], Verdict]:
    if isinstance(layer, CONVOLUTIONS):
        return verdict_of_convolution
    return verdict_of_embedding if isinstance(layer, Embedding) else verdict_of


def _unknown(kind: type) -> str | None:
    """Say why a layer of a class that is not known is left alone."""
    return MULTIHEAD_ATTENTION if issubclass(kind, MultiheadAttention) else f"{class_name(kind)} layers are not fused"


_SHARDED = "FSDP holds its weights in shards: calls see them whole, and decide then"


def _method(layer: Any) -> str:
    if isinstance(layer, DeloraLinear):
        return "delora"
    if isinstance(layer, ParamWrapper):
        return "expert lora"
    if isinstance(layer, (*CONVOLUTIONS, Embedding)):
        return "dora" if any(layer.use_dora.get(name) for name in layer.active_adapters) else "lora"
    if not lora_linear_of(layer):
        return class_name(type(layer))
    if verdicts.reasons["lora"] is not None:  # an untested PEFT, whose layer may lack what tells them apart
        return "lora"
    names = [name for name in layer.active_adapters if name in layer.lora_A.keys()]  # noqa: SIM118, it may be wrapped
    return "dora" if any(isinstance(layer.lora_variant.get(name), DoraLinearVariant) for name in names) else "lora"
