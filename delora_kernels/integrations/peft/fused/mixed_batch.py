"""A fused LoRA layer that is called with PEFT's `adapter_names`: an adapter, or none, for each
sample.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor

from delora_kernels.bases.plain import has_other_forward
from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import StoredBase
from delora_kernels.functional.lora_by_sample import lora_linear_by_sample
from delora_kernels.integrations.peft.fused.plan import (
    class_name,
    lora_adapter,
    why_not_adapters,
    why_not_base_class,
    why_not_layer,
)
from delora_kernels.integrations.peft.fused.stored_bases import StoredRun, why_not_peft
from delora_kernels.integrations.peft.verdict import State, Verdict

BASE = "__base__"
"""What PEFT calls a sample without an adapter, whatever adapters there are."""

_DEFINED: dict[type, Any] = {LoraLinear: LoraLinear._mixed_batch_forward}
"""Class → its method for such batches, as it was first seen."""


def mixed_verdict_of(layer: Any, names: Sequence[str], x: Tensor) -> Verdict:
    """Judge how a LoRA layer runs such a batch as it stands: fused, or by PEFT's own forward, which
    raises what there is to raise.

    Args:
        layer: PEFT's LoRA linear, fused.
        names: An adapter for each sample; of one that the layer doesn't have, "__base__" among
            them, the base's output alone.
        x: [batch, ..., K].
    """
    plan = _plan_of(layer, names, x)
    return Verdict(State.OWN_FORWARD, plan) if isinstance(plan, str) else Verdict(State.FUSED, None, plan)


def _plan_of(layer: Any, names: Sequence[str], x: Tensor) -> Callable[[Tensor], Tensor] | str:
    reason = why_not_layer(layer) or why_not_base_class(layer) or why_not_peft("batches that mix adapters")
    reason = reason or _why_not_method(type(layer))
    if reason is not None:
        return reason
    if len(names) != len(x) or x.dim() < 2:
        return f"it is called with {len(names)} adapter_names for an input of shape {list(x.shape)}"
    known = layer._modules["lora_A"]
    used = [name for name in dict.fromkeys(names) if name in known and name != BASE]
    adapters: list[Any] = []
    for name in used:
        adapter = lora_adapter(layer, name)
        if isinstance(adapter, str):
            return adapter
        adapters.append(adapter)
    if has_other_forward(layer):
        return "it has a forward of its own"
    base = base_in(layer._modules["base_layer"])
    if isinstance(base, str):
        return base
    reason = why_not_adapters(adapters, base)
    if reason is not None:
        return reason
    for adapter in adapters:
        if adapter.dropout_p:
            return "it is called with adapter_names while dropout drops"
        if adapter.plan is not None or adapter.tensors.keys() != {"lora_A", "lora_B"}:
            return "it is called with adapter_names, and an adapter is more than A and B"
    places = [used.index(name) if name in used else None for name in names]
    A, B = ([adapter.tensors[role] for adapter in adapters] for role in ("lora_A", "lora_B"))
    scales = [adapter.scale for adapter in adapters]
    run = partial(_run, base, A, B, places, scales)
    return StoredRun(base, run, str) if isinstance(base, StoredBase) else run


def _why_not_method(kind: type) -> str | None:
    """Say whether the method that PEFT's forward calls for such batches has been replaced."""
    name = "_mixed_batch_forward"
    if getattr(kind, name) is not _DEFINED.setdefault(kind, getattr(kind, name)):
        return f"{class_name(kind)}.{name} has been replaced"
    return None


def _run(base: Any, A: Any, B: Any, places: Any, scales: Any, x: Tensor) -> Tensor:
    return lora_linear_by_sample(x, base.weight, A, B, places, scales, base.bias)
