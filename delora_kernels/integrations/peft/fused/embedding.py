"""PEFT's LoRA and DoRA on embeddings: the base runs as it is, A's columns are looked up, the rest
is one pass over the output.

    y = base(x) + scale · A[:, x]ᵀ Bᵀ;   DoRA: c ⊙ y,   c = m / ‖Wᵀ + scale · BA‖

PEFT makes an output-sized tensor of the product with B, one of its multiple and one of the sum; for
DoRA it builds BA, of the size of the whole table, at every call.
"""

from typing import Any, NamedTuple

from peft.tuners.lora.dora import DoraEmbeddingLayer
from peft.tuners.lora.layer import Embedding
from peft.tuners.lora.variants import DoraEmbeddingVariant
from torch import Tensor, nn

from delora_kernels.bases.plain import why_not_local, why_not_plain
from delora_kernels.functional.channel_term import add_row_term
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.in_torch import (
    gives_fresh_output,
    plan_in_torch,
    run_in_torch,
    verdict_in_torch,
    why_not_scale,
)
from delora_kernels.integrations.peft.fused.plan import caches_dora_norms, why_not_class
from delora_kernels.integrations.peft.fused.variants import KINDS, LORA
from delora_kernels.integrations.peft.row_norm import constant_row_norm
from delora_kernels.integrations.peft.verdict import Verdict

for _kind in (Embedding, nn.Embedding, DoraEmbeddingVariant, DoraEmbeddingLayer):
    why_not_class(_kind)  # takes note of what the class defines


class FusedEmbedding(Embedding):
    """PEFT's LoRA or DoRA embedding with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return run_in_torch(self, verdict_of_embedding(self), _why_not_call, Embedding.forward, x, args, kwargs)

    def _get_name(self) -> str:
        return "Embedding"  # PEFT's layer status reads the type off the repr


class _Adapter(NamedTuple):
    """One active adapter: A [r, entries], B [N, r], the scale, of DoRA the magnitude [N]."""

    A: Tensor
    B: Tensor
    scale: float
    magnitude: Tensor | None


def verdict_of_embedding(layer: Any) -> Verdict:
    """Judge how an embedding with adapters runs as it stands."""
    return verdict_in_torch(plan_in_torch(layer, Embedding, layer.lora_embedding_A, _adapter, _run))


def _why_not_call(layer: Any, x: Tensor) -> str | None:
    return None if type(x) in (Tensor, nn.Parameter) else f"its input is a {type(x).__name__}"


def _adapter(layer: Any, name: str) -> _Adapter | str:
    A, B, scale = layer.lora_embedding_A[name], layer.lora_embedding_B[name], layer.scaling[name]
    reason: str | None = why_not_local(A, "lora_embedding_A") or why_not_local(B, "lora_embedding_B")
    reason = reason or why_not_scale(scale)
    if reason is not None:
        return reason
    if getattr(layer, "input_fns", {}).get(name) or getattr(layer, "output_fns", {}).get(name):
        return "its embedding is split among devices"
    variant = layer.lora_variant.get(name)
    is_lora = variant is None or KINDS.get(type(variant)) == LORA
    if variant is not None and is_lora:
        reason = why_not_class(type(variant))
        if reason is not None:
            return reason
    magnitude = None if is_lora else _magnitude(layer, name)
    return magnitude if isinstance(magnitude, str) else _Adapter(A, B, float(scale), magnitude)


def _magnitude(layer: Any, name: str) -> Tensor | str:
    """Read DoRA's magnitude, or say why PEFT's own forward must."""
    variant, owner = layer.lora_variant[name], layer.lora_magnitude_vector[name]
    if verdicts.reasons["dora"] is not None:
        return verdicts.reasons["dora"]
    if type(variant) is not DoraEmbeddingVariant:
        return f"its LoRA variant {type(variant).__name__} is not fused"
    if type(owner) is not DoraEmbeddingLayer:
        return f"its magnitude is a {type(owner).__name__}"
    if layer.get_base_layer().max_norm is not None:
        return "its embedding renormalises what it looks up (max_norm)"
    if caches_dora_norms(layer):
        return "PEFT's cache of DoRA norms is on"
    reason: str | None = why_not_class(type(variant)) or why_not_class(type(owner)) or why_not_plain(owner, "magnitude")
    weight = layer.get_base_layer().weight
    reason = reason or why_not_local(owner.weight, "magnitude") or why_not_local(weight, "base weight")
    return owner.weight if reason is None else reason


def _run(layer: Any, adapters: list[_Adapter], x: Tensor) -> Tensor:
    """Run the adapters one after the other, as PEFT does."""
    y: Tensor = layer.base_layer(x)
    dtype, embed_scale = y.dtype, layer._get_embed_scale()
    fresh = gives_fresh_output(layer.base_layer, (nn.Embedding,))
    for A, B, scale, magnitude in adapters:
        h = layer._embed(x, A.t())
        if embed_scale is not None:  # of Gemma's, whose base scales what it looks up
            h = h * embed_scale.to(h.dtype)
        y, fresh = add_row_term(y, h, B, scale, fresh), True  # what was made here nobody else has
        if magnitude is not None:
            y = y * (magnitude / constant_row_norm(layer.get_base_layer().weight.t(), A, B, scale))
    return y.to(dtype)
