"""The experts of an expert model (`target_parameters`) as low-rank terms, one pair for each adapted
parameter and expert, and their layouts in a file.

    W'_e = W_e + B'_e A'_e,   A' [E, R, K],  B' [E, N, R]

Layouts (`experts=` of export_lora):

    "fused"        PEFT's own keys, which PEFT loads and vLLM's 3-D models read. Of a module's
                   parameters the last is `experts.lora_A`, the one before it
                   `experts.base_layer.lora_A`; A (E·R, K) holds (expert, rank) in its rows, B
                   (N, R·E) holds (rank, expert) in its columns.
    "per_expert"   `experts.3.gate_proj.lora_A` [R, K] and so on, by the names that the model's
                   checkpoints give to single experts; a fused gate_up is cut into gate and up,
                   which share A.
"""

from typing import Any, NamedTuple

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor

from delora_kernels import checks
from delora_kernels.bases.plain import why_not_local
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.integrations.peft.export.low_rank_terms import adapters_of
from delora_kernels.integrations.peft.export.refusal import FUNCTION, refuse

try:
    from transformers import conversion_mapping
    from transformers.core_model_loading import Concatenate, Interleave, WeightConverter, WeightRenaming
except ImportError:  # a Transformers whose experts are modules: there are no such parameters
    conversion_mapping = None  # type: ignore[assignment]

LAYOUTS = ("fused", "per_expert")


class ExpertPair(NamedTuple):
    """The update of one parameter, on the CPU.

    Args:
        A, B: [E, R, K], [E, N, R].
        dtype: Of the factors that it was made from.
        depth: How many of its module's adapted parameters come after it.
    """

    A: Tensor
    B: Tensor
    dtype: torch.dtype
    depth: int


def are_experts(layers: list[Any]) -> bool:
    """Whether the layers of one name are PEFT's wrappers of a module's parameters."""
    return any(isinstance(layer, ParamWrapper) for layer in layers)


def expert_pairs(name: str, wrappers: list[Any], adapter: str | None) -> dict[str, ExpertPair]:
    """Return the update of every adapted parameter of the module `name`, by the parameter's name;
    several adapters stacked.
    """
    module = wrappers[-1].get_base_layer()
    by_parameter = {wrapper.parameter_name: wrapper for wrapper in wrappers if isinstance(wrapper, ParamWrapper)}
    if len(by_parameter) < len(wrappers):
        refuse(name, "adapters of its parameters inside other adapters")
    stacked = {}
    for parameter, _ in module.named_parameters(recurse=False):  # PEFT's order, from the inside
        wrapper = by_parameter.get(parameter)
        pairs = [] if wrapper is None else [_pair(name, wrapper, one) for one in adapters_of(name, wrapper, adapter)]
        if pairs:
            dtype = pairs[0][0].dtype
            acc = accumulate_dtype(dtype)
            A = torch.cat([A.to("cpu", acc) for A, _, _ in pairs], 1)
            B = torch.cat([B.to("cpu", acc) * scale for _, B, scale in pairs], 2)
            stacked[parameter] = (A, B, dtype)
    return {each: ExpertPair(*stacked[each], len(stacked) - 1 - place) for place, each in enumerate(stacked)}


@torch.no_grad()
def _pair(name: str, wrapper: Any, adapter: str) -> tuple[Tensor, Tensor, float]:
    """One adapter's factors by expert."""
    E = wrapper.num_experts
    if wrapper._param_ndim != 3:
        refuse(name, f"an adapter of its 2-D parameter {wrapper.parameter_name}")
    if wrapper.lora_variant.get(adapter) is not None:
        refuse(name, "a LoRA variant on its experts")
    A, B = wrapper.lora_A[adapter].weight.detach(), wrapper.lora_B[adapter].weight.detach()
    for role, tensor in (("A", A), ("B", B)):
        reason = why_not_local(tensor, f"lora_{role}")
        if reason is not None:
            raise checks.fail(ValueError, FUNCTION, f"layer {name!r}", "one whole on this process", reason, "gather it")
    r = A.shape[0] // E
    return A.view(E, r, -1), B.view(B.shape[0], r, E).permute(2, 0, 1), float(wrapper.scaling[adapter])


def fused_tensors(name: str, pair: ExpertPair) -> dict[str, Tensor]:
    """Return the two tensors of a parameter in PEFT's packing, by their keys without a prefix."""
    key = f"{name}{'.base_layer' * pair.depth}"
    B = pair.B.permute(1, 2, 0).flatten(1)
    return {f"{key}.lora_A.weight": pair.A.flatten(0, 1), f"{key}.lora_B.weight": B}


class ExpertNames(NamedTuple):
    """How the checkpoints of a model name what a fused parameter is made of.

    Args:
        parts: Names of one expert's linears: gate and up, or one alone.
        interleaved: Whether gate and up alternate row by row.
        renamed: (ours, theirs) parts of the names above.
    """

    parts: list[str]
    interleaved: bool
    renamed: list[tuple[str, str]]


def expert_names(model_type: Any, name: str, parameter: str) -> ExpertNames:
    """Read from Transformers how a model's checkpoints name single experts.

    Raises:
        ValueError: they keep the experts in one tensor, or nothing is known.
    """
    found = None if conversion_mapping is None else conversion_mapping.get_checkpoint_conversion_mapping(model_type)
    renamed = [
        (each.target_patterns[0], source)
        for each in found or ()
        if type(each) is WeightRenaming
        and (source := each.source_patterns[0].replace(r"\.", ".")).strip(".").isidentifier()
    ]
    for each in found or ():
        if type(each) is WeightConverter and f"{name}.{parameter}".endswith(each.target_patterns[0].lstrip("^")):
            parts = [source.removesuffix(".weight").rpartition(".")[2] for source in each.source_patterns]
            known = all(".*." in source for source in each.source_patterns) and len(parts) <= 2
            joined = [op for op in each.operations if isinstance(op, Concatenate | Interleave)]
            if known and len(joined) == len(parts) - 1:
                return ExpertNames(parts, any(isinstance(op, Interleave) for op in joined), renamed)
    raise checks.fail(
        ValueError,
        FUNCTION,
        "experts",
        "'fused' for this model",
        f"'per_expert' for {name}.{parameter} of a {model_type!r} model, whose checkpoints name no single experts",
        "pass experts='fused', or merge the adapter and save the whole model",
    )


def per_expert_tensors(name: str, pair: ExpertPair, names: ExpertNames) -> dict[str, Tensor]:
    """Return every expert's tensors by their keys without a prefix."""
    for ours, theirs in names.renamed:
        name = name.replace(ours, theirs)
    tensors = {}
    for e, (A, B) in enumerate(zip(pair.A, pair.B, strict=True)):
        for part, rows in zip(names.parts, _parts(B, names), strict=True):
            tensors[f"{name}.{e}.{part}.lora_A.weight"] = A
            tensors[f"{name}.{e}.{part}.lora_B.weight"] = rows
    return tensors


def _parts(B: Tensor, names: ExpertNames) -> tuple[Tensor, ...]:
    if len(names.parts) == 1:
        return (B,)
    return (B[::2], B[1::2]) if names.interleaved else B.chunk(2)
