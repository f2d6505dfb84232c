"""What of a model is a low-rank term: its adapter layers by their name in the base model, each as
one pair A', B'.

`survey` walks the model once and gives every module the name that it has, or had, in the model
without adapters: PEFT's and torch's wrappers vanish from it. `pair_of` folds all that acts on one
linear into y += x A'ᵀ B'ᵀ, and refuses what is no such term. Nothing here writes to the model.
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import reduce
from itertools import chain
from typing import Any, NamedTuple

import torch
from peft import PeftConfig, PeftMixedModel, PeftModel
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper, ModulesToSaveWrapper
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from delora_kernels import checks
from delora_kernels.bases.plain import why_not_local
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.integrations.peft.export.peft_folds import Fold, peft_fold
from delora_kernels.integrations.peft.export.refusal import FUNCTION, refuse
from delora_kernels.nn import AdapterLinear, DeLoRALinear, DoRALinear, LoRALinear, MoELoRALinear
from delora_kernels.nn.base import MergeableLinear

LOW_RANK = (LoRALinear, DeLoRALinear)
"""The modules of `nn` that are low-rank terms: y += x A'ᵀ B'ᵀ, A' and B' by their `_factors`."""

NOT_LOW_RANK = {
    DoRALinear: ("DoRA, which rescales the rows of W itself", "merge() it and save the whole model instead"),
    MoELoRALinear: ("a mixture, whose update is another for every token", "save the whole model instead"),
}
"""Those that are none, with their subclasses: what to say of them, and the remedy."""

_WRAPPED: dict[type, str] = {
    PeftModel: "base_model",
    PeftMixedModel: "base_model",
    BaseTuner: "model",
    DistributedDataParallel: "module",
}
"""Where a wrapper keeps the one module it stands for."""

_WRAPPER_CHILDREN = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
"""Names under which torch's other wrappers (compile, FSDP, checkpointing) keep it."""

_GATHER = "gather it first (FSDP: summon_full_params, DTensor: full_tensor, DeepSpeed: GatheredParameters)"


class Pair(NamedTuple):
    """A low-rank update y += x A'ᵀ B'ᵀ: A' [R, K] and B' [N, R], the dtype of the factors it was
    made from, and DoRA's magnitude [N].
    """

    A: Tensor
    B: Tensor
    dtype: torch.dtype
    magnitude: Tensor | None = None


@dataclass
class Survey:
    """The modules of a model by their names in the base model.

    Args:
        layers: The adapter layers; more than one where PEFT layers are nested around one linear.
        savers: PEFT's wrappers of modules that are trained beside the adapters.
        base: Every module of the base model itself.
        configs: (adapter name, config) of all PEFT adapters in the model.
    """

    layers: dict[str, list[Any]] = field(default_factory=dict)
    savers: dict[str, Any] = field(default_factory=dict)
    base: dict[str, nn.Module] = field(default_factory=dict)
    configs: list[tuple[str, PeftConfig]] = field(default_factory=list)


def survey(model: nn.Module) -> Survey:
    """Every module of `model` under its name in the base model; a module held twice counts where it
    comes first.
    """
    found, seen = Survey(), set[int]()

    def visit(module: nn.Module, name: str) -> None:
        is_layer = isinstance(module, BaseTunerLayer | AdapterLinear)
        if id(module) in seen:
            if is_layer:
                refuse(name, "a module that the model holds under a second name too", "give each place a layer")
            return
        seen.add(id(module))
        if isinstance(module, MergeableLinear) and not is_layer:
            remedy = "merge() it where it can be merged, and save the whole model instead"
            refuse(name, f"a {type(module).__name__}, whose update no LoRA adapter of linears holds", remedy)
        # PEFT's wrappers answer for the module in them
        configs = None if isinstance(module, AuxiliaryTrainingWrapper) else getattr(module, "peft_config", None)
        for item in configs.items() if isinstance(configs, dict) else ():
            if all(item[1] is not config for _, config in found.configs):
                found.configs.append(item)
        if is_layer:
            found.layers.setdefault(name, []).append(module)
        wrapped = next((child for kind, child in _WRAPPED.items() if isinstance(module, kind)), None)
        if isinstance(module, BaseTunerLayer):
            wrapped = "base_layer"
        elif isinstance(module, AuxiliaryTrainingWrapper):
            wrapped = "original_module"
            found.savers[name] = module
            adapted = any(isinstance(inner, BaseTunerLayer | AdapterLinear) for inner in module.modules())
            if adapted and isinstance(module, ModulesToSaveWrapper):
                refuse(name, "a module trained beside the adapters that holds adapters itself")
        if wrapped is not None:
            visit(getattr(module, wrapped), name)
            return
        if not any(child in module._modules for child in _WRAPPER_CHILDREN):
            found.base.setdefault(name, module)
        for child, inner in module._modules.items():
            if inner is not None:
                visit(inner, name if child in _WRAPPER_CHILDREN else f"{name}.{child}" if name else child)

    visit(model, "")
    return found


def adapters_of(name: str, layer: Any, adapter: str | None) -> list[str]:
    """Return the PEFT adapters of one layer or wrapper that are to be exported: `adapter`, or the
    active ones.
    """
    chosen = layer.active_adapters if adapter is None else [adapter]
    if isinstance(layer, AuxiliaryTrainingWrapper):
        # without one of the active adapters, or disabled (as PEFT may leave it then), it runs the
        # module as it was
        unused = adapter is None and layer.disable_adapters
        return list(chosen) if layer._adapters.issuperset(chosen) and not unused else []
    if layer.merged:
        remedy = "call unmerge_adapter() first (diffusers: unfuse_lora())"
        refuse(name, "a merged adapter: its base weight is not the base model's", remedy, "unmerged")
    available = layer._get_available_adapters()
    chosen = [one for one in chosen if one in available]
    if chosen and layer.disable_adapters:
        remedy = "enable them first (enable_adapter_layers(); diffusers: enable_lora())"
        refuse(name, "disabled adapters: the model computes its base", remedy, "enabled")
    return chosen


def pair_of(name: str, layers: list[Any], adapter: str | None, *, diffusion: bool = False) -> Pair | None:
    """All that acts on the linear `name`, stacked into one pair, on the CPU in float32 (float64 for
    float64 factors).

        A' = [A'₁; A'₂; ...],   B' = [B'₁, B'₂, ...]

    None where none of the wanted adapters acts on it. With `diffusion`, the file is one that holds
    convolutions, their A' flattened, and DoRA, which stands alone.
    """
    folds: list[Fold] = []
    for layer in layers:
        if isinstance(layer, AdapterLinear):
            folds.append(_fold_own(name, layer))
            continue
        for chosen in adapters_of(name, layer, adapter):
            folds.append(peft_fold(name, layer, chosen, diffusion))
    if not folds:
        return None
    tensors = [(role, tensor) for each in folds for role, tensor in each.tensors.items()]
    for role, tensor in tensors:
        reason = why_not_local(tensor, role)
        if reason is not None:
            remedy = "load or initialise it first" if tensor.is_meta else _GATHER
            raise checks.fail(ValueError, FUNCTION, f"layer {name!r}", "one whole on this process", reason, remedy)
    magnitude = next((tensor for role, tensor in tensors if role == "magnitude"), None)
    if magnitude is not None and len(folds) > 1:
        refuse(name, "DoRA beside another adapter, which it rescales too", "activate one of them")
    acc = accumulate_dtype(_promote(tensor for _, tensor in tensors))
    pairs = []
    with torch.no_grad():
        for fold in folds:
            A, B = fold.factors(acc)
            K, N = fold.K, fold.N
            if A.dim() != 2 or A.shape[1] != K or B.shape != (N, A.shape[0]):
                got = f"{list(A.shape)} and {list(B.shape)}"
                raise checks.fail(ValueError, FUNCTION, f"layer {name!r}", f"of [R, {K}] and [{N}, R]", got, _GATHER)
            pairs.append((A.cpu(), B.cpu()))
        A, B = torch.cat([A for A, _ in pairs]), torch.cat([B for _, B in pairs], dim=1)
        magnitude = None if magnitude is None else magnitude.detach().flatten().cpu()
    return Pair(A, B, _promote(tensor for role, tensor in tensors if role.endswith(("A", "B"))), magnitude)


def _promote(tensors: Iterable[Tensor]) -> torch.dtype:
    return reduce(torch.promote_types, (tensor.dtype for tensor in tensors))


def _fold_own(name: str, layer: AdapterLinear) -> Fold:
    for kind, why_not in NOT_LOW_RANK.items():
        if isinstance(layer, kind):
            refuse(name, *why_not)
    if type(layer) not in LOW_RANK:
        got = f"a {type(layer).__qualname__}, which is not listed in low_rank_terms.LOW_RANK"
        refuse(name, got, "merge() it and save the whole model instead")
    if layer.merged:
        refuse(name, "a merged adapter: its weight is not the base model's", "call unmerge() first")
    tensors = chain(layer.named_parameters(), layer.named_buffers())
    factors = {role: tensor for role, tensor in tensors if role not in ("weight", "bias")}

    def folded(acc: torch.dtype) -> tuple[Tensor, Tensor]:
        A, B, scale = layer._factors(acc)
        return A, B * scale

    return Fold(factors, folded, layer.in_features, layer.out_features)
