"""Whether the file of an exported adapter says of every expert what the model computes: ΔW_e of the
file, by the rules of its readers, against PEFT's own get_delta_weight.

A layout that is off by a permutation loads everywhere and adapts the wrong columns, so each export
of experts is read back and compared before it is handed out.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from delora_kernels.integrations.peft.export.expert_terms import ExpertNames
from delora_kernels.integrations.peft.export.low_rank_terms import adapters_of

ROUNDING = 16
"""Units of the last place, relative to the largest |ΔW| (the sum of several adapters' largest),
that may lie between the two: both factors are rounded when written, and both sides sum R products.
"""


@torch.no_grad()
def check_file(
    file: Path, prefix: str, name: str, wrappers: list[Any], adapter: str | None, names: dict[str, ExpertNames]
) -> None:
    """Compare one module's experts.

    Args:
        file: The adapter's safetensors.
        prefix: What its keys start with.
        name: Of the module, in the base model.
        wrappers: PEFT's around it, from the outside.
        adapter: As in export_lora.
        names: By parameter, of the layout "per_expert"; empty: "fused".

    Raises:
        RuntimeError: an expert's update is another.
    """
    module = wrappers[-1].get_base_layer()
    order = [parameter for parameter, _ in module.named_parameters(recurse=False)]
    active = [wrapper for wrapper in wrappers if adapters_of(name, wrapper, adapter)]
    active.sort(key=lambda wrapper: order.index(wrapper.parameter_name))
    with safe_open(file, framework="pt") as held:
        for depth, wrapper in enumerate(reversed(active)):
            updates = [wrapper.get_delta_weight(one).float() for one in adapters_of(name, wrapper, adapter)]
            expected: Any = sum(updates)
            if getattr(module, "is_transposed", False):
                expected = expected.mT
            E, parameter, rounded = len(expected), wrapper.parameter_name, torch.finfo(wrapper.get_param().dtype).eps
            largest = sum(float(each.abs().max()) for each in updates)  # they may cancel
            for e in range(E):
                if names:
                    found, dtype = _of_expert(held, prefix, name, e, names[parameter])
                else:
                    found, dtype = _of_fused(held, f"{prefix}{name}{'.base_layer' * depth}", e, E)
                off = float((found - expected[e].cpu()).abs().max())
                if not off <= ROUNDING * max(torch.finfo(dtype).eps, rounded) * largest:
                    raise RuntimeError(
                        f"export_lora: the file would hold another update of {name}.{parameter}, expert {e}, than "
                        f"the model: off by {off:.2g} of {largest:.2g}. Please report it; merge the adapter and "
                        "save the whole model instead"
                    )


def _of_fused(held: Any, key: str, e: int, E: int) -> tuple[Tensor, torch.dtype]:
    """ΔW_e as PEFT and vLLM read it: (E, R, K) and (N, R, E)."""
    A, B = (held.get_tensor(f"{key}.lora_{role}.weight") for role in "AB")
    R = A.shape[0] // E
    return B.float().reshape(B.shape[0], R, E)[:, :, e] @ A.float().reshape(E, R, -1)[e], A.dtype


def _of_expert(held: Any, prefix: str, name: str, e: int, names: ExpertNames) -> tuple[Tensor, torch.dtype]:
    """ΔW_e from one expert's own linears, put together as the model's checkpoints are."""
    for ours, theirs in names.renamed:
        name = name.replace(ours, theirs)
    updates, dtype = [], torch.float32
    for part in names.parts:
        A, B = (held.get_tensor(f"{prefix}{name}.{e}.{part}.lora_{role}.weight") for role in "AB")
        updates.append(B.float() @ A.float())
        dtype = A.dtype
    whole = torch.stack(updates, 1).flatten(0, 1) if names.interleaved else torch.cat(updates)
    return whole, dtype
