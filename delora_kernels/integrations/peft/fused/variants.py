"""PEFT's variants of LoRA that are the same equation: aLoRA, whose term is on a sample's last
tokens alone, Arrow, a mixture whose gates are given, KaSA, LoRA with a diagonal between its
factors, and MiCA, which is LoRA with another start.

    aLoRA:  y_t = W x_t + bias + [t among its sample's last] scale · B A x_t
    Arrow:  y_t = W x_t + bias + Σ_e w_te · scale_e · B_e A_e x_t,
            w = softmax over the top k of |x p_e| / temperature,   p_e an expert's prototype
    KaSA:   y = W x + bias + scale · B diag(d) A x
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from peft.tuners.lora import variants
from peft.tuners.lora.arrow import ArrowLoraLinearLayer
from torch import Tensor, nn

from delora_kernels import functional
from delora_kernels.bases.plain import parameter, why_not_local, why_not_plain
from delora_kernels.functional.lora_by_sample import lora_linear_on_last

LORA, DORA, ALORA, ARROW, KASA = "lora", "dora", "alora", "arrow", "kasa"
KINDS: dict[type, str] = {
    getattr(variants, name): kind
    for name, kind in (
        ("DoraLinearVariant", DORA),
        ("ALoraLinearVariant", ALORA),
        ("ArrowLinearVariant", ARROW),
        ("MiCALinearVariant", LORA),  # from here on of newer versions
        ("MiCAEmbeddingVariant", LORA),
        ("KasaLinearVariant", KASA),
    )
    if hasattr(variants, name)
}
"""Class of a variant → what computes it: of linears, and of embeddings MiCA's."""

_PAIR = {"lora_A", "lora_B"}


@dataclass(frozen=True)
class ActivatedRun:
    """x → y of an aLoRA linear.

    Args:
        base: The frozen linear.
        A, B, scale: The adapter.
        offsets: For each sample how many of its last tokens the adapter is for, or None: none.
            None: for no token of any.
    """

    base: Any
    A: Tensor
    B: Tensor
    scale: float
    offsets: Sequence[int | None] | None = None

    def __call__(self, x: Tensor) -> Tensor:
        last = [0 if each is None else max(0, int(each)) for each in self.offsets or [None] * len(x)]
        return lora_linear_on_last(x, self.base.weight, self.A, self.B, last, self.scale, self.base.bias)

    def at(self, offsets: Sequence[int | None] | None) -> "ActivatedRun":
        """Return the run of a call that is given these."""
        return replace(self, offsets=offsets)

    def why_not(self, x: Tensor, offsets: Any) -> str | None:
        """Say why a call is left to PEFT's own forward, or None."""
        if x.dim() not in (2, 3) or (offsets is not None and len(offsets) != len(x)):
            given = "no" if offsets is None else len(offsets)
            return f"it is called with {given} alora_offsets for an input of shape {list(x.shape)}"
        return None


@dataclass(frozen=True)
class ArrowRun:
    """x → y of a linear with an Arrow router.

    Args:
        layer: PEFT's LoRA linear, which holds the experts.
        arrow: The router.
        base: The frozen linear.
    """

    layer: Any
    arrow: Any
    base: Any

    def __call__(self, x: Tensor) -> Tensor:
        """Run the mixture with the gates that PEFT's own operations make, so that the same experts
        are chosen.
        """
        layer, arrow = self.layer, self.arrow
        arrow.gen_know_sub(layer.lora_A, layer.lora_B)  # once, and again for adapters that came later
        arrow.build_prototypes(layer.lora_A, layer.lora_B)
        names = arrow.task_adapter_names
        A, B = (torch.stack([of[name].weight for name in names]) for of in (layer.lora_A, layer.lora_B))
        near = (x.to(A.dtype) @ arrow.prototypes.T).abs()
        largest, chosen = near.topk(arrow.top_k, dim=-1)
        score = torch.full_like(near, -torch.inf).scatter(-1, chosen, largest)
        gates = torch.softmax(score / arrow.temperature, dim=-1)
        scale = torch.tensor([layer.scaling[name] for name in names], dtype=torch.float64, device=x.device)
        rest = {"gates": gates, "scale": scale, "bias": self.base.bias}
        y: Tensor = functional.moe_lora_linear(x, self.base.weight, A, B, **rest)[0]
        return y


def plan_of_variant(kind: str, layer: Any, name: str, adapter: Any, base: Any) -> Callable[[Tensor], Tensor] | str:
    """Plan a linear whose one active adapter is none of LoRA and DoRA, or say why not.

    Args:
        kind: ALORA, ARROW or KASA.
        layer: PEFT's LoRA linear.
        name: Of the adapter.
        adapter: As plan.py reads it.
        base: The frozen linear.
    """
    if kind == KASA:
        return _kasa(layer, name, adapter, base)
    if adapter.dropout_p:
        return f"its LoRA variant {type(layer.lora_variant[name]).__name__} is not fused while dropout drops"
    if kind == ALORA:
        if adapter.tensors.keys() != _PAIR:
            return "its adapter is more than a pair of factors"
        return ActivatedRun(base, adapter.tensors["lora_A"], adapter.tensors["lora_B"], adapter.scale)
    arrow = layer.lora_arrow[name]
    if type(arrow) is not ArrowLoraLinearLayer:
        return f"its arrow router is a {type(arrow).__name__}"
    names = [each for each in (*arrow.task_adapter_names, *arrow.gks_adapter_names) if each in layer.lora_A]
    experts = [(role, getattr(layer, role)[each]) for role in ("lora_A", "lora_B") for each in names]
    for role, owner in [("arrow router", arrow), *experts]:
        reason: str | None = why_not_plain(owner, role)
        if reason is None and type(owner) is nn.Linear:
            weight = parameter(owner, "weight")
            reason = why_not_local(weight, role)
            if reason is None and weight.device != base.device:
                reason = f"its {role} is on another device than its base"
        if reason is not None:
            return reason
    return ArrowRun(layer, arrow, base)


def _kasa(layer: Any, name: str, adapter: Any, base: Any) -> Callable[[Tensor], Tensor] | str:
    if name in layer._lora_kasa_truncation_deferred:
        return f"its LoRA variant {type(layer.lora_variant[name]).__name__} is not fused before its first call"
    d = layer.lora_diag[name]
    if adapter.tensors.keys() != _PAIR or type(layer.lora_diag) is not nn.ParameterDict:
        return "its adapter is more than a pair of factors"
    reason = why_not_local(d, "lora_diag")
    if reason is None and d.device != base.device:
        return "its lora_diag is on another device than its base"
    return reason or partial(_run_kasa, d, adapter, base)


def _run_kasa(d: Tensor, adapter: Any, base: Any, x: Tensor) -> Tensor:
    A, B = adapter.tensors["lora_A"] * d[:, None], adapter.tensors["lora_B"]
    return functional.lora_linear(x, base.weight, A, B, adapter.scale, base.bias, dropout_p=adapter.dropout_p)
