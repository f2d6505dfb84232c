"""W' of a layer with adapters: what it begins from, and one step for each adapter, which updates a
few rows at a time.

    LoRA     V ← V + s · BA                             DeLoRA   V ← V + B̂ Â
    DoRA     V ← c ⊙ (V + s · BA),  c = m / ‖W + s · BA‖     ETHER    V = H_out W H_in, whole

W is that of the frozen base; several adapters act in PEFT's order, as the layers' own forward lets
them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.lora.variants import (
    DoraConv1dVariant,
    DoraConv2dVariant,
    DoraConv3dVariant,
    DoraEmbeddingVariant,
    DoraLinearVariant,
)
from torch import Tensor, nn

from delora_kernels import ops
from delora_kernels.autograd.reflection import reflected_weight
from delora_kernels.bases.plain import parameter, why_not_local
from delora_kernels.bases.stored_experts import StoredExperts, is_stored, why_not_stored
from delora_kernels.integrations.peft.changes.measure import Step, wide, wide_dtype
from delora_kernels.integrations.peft.changes.weights import matrix_of
from delora_kernels.integrations.peft.methods.base import OwnLayer
from delora_kernels.integrations.peft.methods.ether.layer import PeftEtherLinear, PeftEtherPlusLinear
from delora_kernels.integrations.peft.verdict import DISABLED, INACTIVE
from delora_kernels.nn import (
    DeLoRALinear,
    DoRALinear,
    EtherLinear,
    EtherPlusLinear,
    GroupedDeLoRALinear,
    GroupedDoRALinear,
    MoELoRALinear,
)
from delora_kernels.nn.base import MergeableLinear
from delora_kernels.op_arguments import Start, Strength

_DORA = (DoraLinearVariant, DoraEmbeddingVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_DELORA_EPS = 1e-4
"""PEFT's lower clamp of DeLoRA's norms."""

MIXTURE = "a mixture, whose update is another for every token"
MERGED = "its adapters are merged, and W is gone: pass since, or call unmerge_adapter() first"


class Adapted(NamedTuple):
    """A layer, or one expert of it, with its adapters.

    Args:
        before: W [N, K].
        base: What the steps begin from: W itself, or a weight that is W' already.
        steps: The adapters, in the order in which they act.
        method: What they are: "lora", "rslora", "dora", "delora", "ether", "ether+", or several.
        adapters: Their names in PEFT.
        seen: What makes [N, K] of another tensor in the weight's place, or says why it can't.
        bound: What ‖ΔW‖_F can't exceed, of DeLoRA: Σ λ max n; None: nothing bounds it.
        expert: Number of the expert.
        parameter: Name of the adapted parameter.
    """

    before: Tensor
    base: Tensor
    steps: list[Step]
    method: str
    adapters: tuple[str, ...]
    seen: Callable[[Tensor], Tensor | str]
    bound: float | None = None
    expert: int | None = None
    parameter: str = "weight"


class Left(Exception):
    """A layer whose W' can't be told; the text says why."""


def adapted(layer: Any, merged_too: bool = False) -> Iterator[Adapted]:
    """Yield what a layer with adapters computes now, of experts one after the other.

    Args:
        layer: A layer of PEFT's, or a module of `nn`.
        merged_too: Take what a base has become, with what is merged into it, where no adapter acts
            beside it: W is known from elsewhere.

    Raises:
        Left: that can't be told.
    """
    if isinstance(layer, MergeableLinear):
        yield from _own_module(layer, merged_too)
    elif isinstance(layer, ParamWrapper):
        yield from _experts(layer, merged_too)
    else:
        yield _peft_layer(layer, merged_too)


def _peft_layer(layer: Any, merged_too: bool) -> Adapted:
    base = layer.get_base_layer()
    if layer.base_layer is not base:
        raise Left(f"it stands around another adapter layer, a {type(layer.base_layer).__name__}")
    weight, seen = _matrix(base), partial(matrix_of, base)
    read: Callable[[Any, str], Read] | None = None
    held: Any
    kind = next(each for each in type(layer).__mro__ if not each.__module__.startswith("delora_kernels."))
    if isinstance(layer, OwnLayer):
        held = layer.options
    elif isinstance(layer, DeloraLinear):
        read, held = _delora, layer.delora_A
    elif isinstance(layer, LoraLayer) and kind.__module__.startswith("peft.tuners.lora."):
        read, held = _lora, {**layer.lora_A, **layer.lora_embedding_A}
    else:
        raise Left(f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__} is not read")
    names, reason = _acting(layer, held)
    if reason == MERGED and isinstance(layer, OwnLayer) and layer._unmerged is not None:  # these keep W
        kept = layer._seen(layer._unmerged)
        return Adapted(kept, weight, [], layer.fused_method, tuple(layer.merged_adapters), seen)
    if reason is not None:
        if not merged_too:
            raise Left(reason)
        return Adapted(weight, weight, [], "full", (), seen)
    if isinstance(layer, (PeftEtherLinear, PeftEtherPlusLinear)):
        return Adapted(weight, layer._merged(weight, list(names)), [], layer.fused_method, names, seen)
    if read is None:
        raise Left(f"{layer.fused_method} is {MIXTURE}")
    found = [read(layer, name) for name in names]
    bounds = [bound for _, _, bound in found if bound is not None]
    method = " + ".join(dict.fromkeys(method for _, method, _ in found))
    bound = sum(bounds) if len(bounds) == len(found) else None
    return Adapted(weight, weight, [step for step, _, _ in found], method, names, seen, bound)


def _acting(layer: Any, held: Any) -> tuple[tuple[str, ...], str | None]:
    """Return the adapters that act beside a layer's base, or why none does."""
    names = tuple(name for name in layer.active_adapters if name in held)
    if layer.disable_adapters:
        return (), DISABLED
    if layer.merged:
        return (), MERGED
    return names, None if names else INACTIVE


def _matrix(module: nn.Module) -> Tensor:
    found = matrix_of(module)
    if isinstance(found, str):
        raise Left(found)
    return found


Read = tuple[Step, str, float | None]
"""What one adapter does, its method, and what bounds its update."""


def _lora(layer: Any, name: str) -> Read:
    """Read one adapter of a LoRA layer: of a linear, a convolution or an embedding."""
    variant = layer.lora_variant.get(name)
    if variant is not None and type(variant) not in _DORA:
        raise Left(f"its LoRA variant {type(variant).__name__} is not read")
    if name in layer.lora_embedding_A:
        A, B = layer.lora_embedding_A[name], layer.lora_embedding_B[name]
    else:
        A, B = parameter(layer.lora_A[name], "weight"), parameter(layer.lora_B[name], "weight")
        if getattr(layer.lora_B[name], "groups", 1) != 1:
            raise Left("its convolution has groups")
    for tensor, role in ((A, "lora_A"), (B, "lora_B")):
        _whole(tensor, role)
    A, B, scale = wide(A.flatten(1)), wide(B.flatten(1)), float(layer.scaling[name])
    if variant is None:
        return partial(_add, A, B, scale), "rslora" if layer.use_rslora.get(name) else "lora", None
    magnitude = parameter(layer.lora_magnitude_vector[name], "weight")
    _whole(magnitude, "magnitude")
    return partial(_rescale, A, B, scale, wide(magnitude.flatten())), "dora", None


def _delora(layer: Any, name: str) -> Read:
    held = (layer.delora_A, layer.delora_B, layer.delora_lambda, layer.delora_w_norm)
    A, B, lam, weight_norm = (_whole(each[name], "adapter") for each in held)
    A_hat, B_hat, _, _ = ops.fold(
        wide(A), wide(B), Strength(wide(lam), wide(weight_norm), _DELORA_EPS), Start(), torch.float64, "eager"
    )
    return partial(_add, A_hat, B_hat, 1.0), "delora", float(lam.abs().sum() * weight_norm.abs().max())


def _add(A: Tensor, B: Tensor, scale: float, rows: Tensor, W: Tensor, which: slice) -> Tensor:
    """V + s · BA."""
    return torch.addmm(rows, B[which], A, alpha=scale)


def _rescale(A: Tensor, B: Tensor, scale: float, magnitude: Tensor, rows: Tensor, W: Tensor, which: slice) -> Tensor:
    """c ⊙ (V + s · BA), c = m / ‖W + s · BA‖; a row of length 0 has no direction, and stays 0."""
    update = B[which] @ A * scale
    norm = torch.linalg.vector_norm(W + update, dim=1)
    return (rows + update) * (magnitude[which] / norm.masked_fill(norm == 0, torch.inf))[:, None]


def _experts(layer: Any, merged_too: bool) -> Iterator[Adapted]:
    """Read LoRA on a parameter, of several experts one after the other."""
    names, reason = _acting(layer, layer.lora_A)
    if reason is not None and not merged_too:
        raise Left(reason)
    weight, E = layer.get_param(), layer.num_experts
    held = is_stored(weight)
    against = why_not_stored(weight, "weight") if held else why_not_local(weight, "weight")
    if against is not None:
        raise Left(against)
    pairs: list[tuple[Tensor, Tensor, float]] = []
    for name in names:  # PEFT's packing: (expert, rank, in) in A's rows, (out; rank, expert) in B's columns
        A, B = wide(_whole(layer.lora_A[name].weight, "lora_A")), wide(_whole(layer.lora_B[name].weight, "lora_B"))
        pairs.append((A.view(E, -1, A.shape[1]), B.view(B.shape[0], -1, E), float(layer.scaling[name])))
    method = " + ".join(dict.fromkeys("rslora" if layer.use_rslora.get(name) else "lora" for name in names)) or "full"
    transposed = weight.dim() == 3 and not layer._did_swap_in_out_features
    for e in range(E):
        expert = e if weight.dim() == 3 else None
        seen = partial(_of_experts, expert, transposed)
        before = StoredExperts(weight, transposed).dense(e, e + 1, torch.float32)[0] if held else seen(weight.detach())
        steps: list[Step] = [partial(_add, A[e], B[:, :, e], scale) for A, B, scale in pairs]
        yield Adapted(before, before, steps, method, names, seen, None, expert, layer.parameter_name)


def _of_experts(expert: int | None, transposed: bool, weight: Tensor) -> Tensor:
    matrix = weight if expert is None else weight[expert]
    return matrix.t() if transposed else matrix


_METHODS: dict[type, str] = {
    DoRALinear: "dora",
    DeLoRALinear: "delora",
    GroupedDoRALinear: "dora",
    GroupedDeLoRALinear: "delora",
    EtherLinear: "ether",
    EtherPlusLinear: "ether+",
}
"""What the modules of `nn` are called where it is not LoRA."""


def _own_module(layer: Any, merged_too: bool) -> Iterator[Adapted]:
    """Read a module of `delora_kernels.nn`, of a merged one the weight that it keeps."""
    if isinstance(layer, MoELoRALinear):
        raise Left(f"a {type(layer).__name__} is {MIXTURE}")
    method = next((name for kind, name in _METHODS.items() if isinstance(layer, kind)), "lora")
    if method == "lora" and layer.rslora:
        method = "rslora"
    weight = layer.base_weight if layer.merged else layer.weight
    if layer.merged and weight.numel() == 0:  # merge(keep_weight=False)
        if not merged_too:
            raise Left("its adapter is merged with keep_weight=False, and W is gone: pass since")
        weight = layer.weight
    weight = _whole(weight, "weight").detach() if layer.stored is None else _matrix(layer.stored)
    for expert in range(layer.experts) if hasattr(layer, "experts") else (None,):
        seen = partial(_of_experts, expert, False)
        before = base = seen(weight)
        steps: list[Step] = []
        if layer.merged:
            base = seen(layer.weight.detach())
        elif hasattr(layer, "_vectors"):
            base = reflected_weight(before, layer.blocks, **layer._vectors())
        else:
            A, B, scale = layer._factors(wide_dtype(weight))
            A, B = wide(_of_experts(expert, False, A)), wide(_of_experts(expert, False, B))
            m = getattr(layer, "magnitude", None)
            m = m if m is None or expert is None else m[expert]
            steps = [partial(_add, A, B, scale) if m is None else partial(_rescale, A, B, scale, wide(m))]
        yield Adapted(before, base, steps, method, (), seen, _bound(layer, expert), expert)


def _bound(layer: Any, e: int | None) -> float | None:
    """Return λ max n of a DeLoRA module; with a frozen start its copies' update is as large once
    more.
    """
    if not isinstance(layer, (DeLoRALinear, GroupedDeLoRALinear)):
        return None
    lam, norm = (layer.lam, layer.weight_norm) if e is None else (layer.lam[e], layer.weight_norm[e])
    strength = float(lam.abs().sum())
    if getattr(layer, "frozen_A", None) is not None:
        frozen = getattr(layer, "frozen_lam", None)
        strength += strength if frozen is None else float(frozen.abs().sum())
    return strength * float(norm.abs().max())


def _whole(tensor: Any, role: str) -> Any:
    """Return a tensor that is whole on this process."""
    reason = why_not_local(tensor, role)
    if reason is not None:
        raise Left(reason)
    return tensor
