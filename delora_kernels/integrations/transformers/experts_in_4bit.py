"""quantize_experts: the experts of a model in bitsandbytes' 4-bit blocks; its loader, and
Transformers', leave them in 16 bits.
"""

from collections import Counter
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.bases.packed_experts import BLOCK_SIZES, QUANT_TYPES, PackedExperts, Storing
from delora_kernels.bases.plain import why_not_local
from delora_kernels.integrations.peft.fused.experts_known import is_quantised, why_not_known

_NAME = "quantize_experts"

torch.serialization.add_safe_globals([PackedExperts, Storing])  # for torch.load of a state dict


@dataclass(frozen=True)
class QuantizedExperts:
    """What quantize_experts did; `str()` of it is the text for people.

    Args:
        parameters: Names of the weights that are stored in 4 bits now.
        left: (name, why) of experts that were left as they are.
        bytes_before, bytes_after: What these parameters took and take.
    """

    parameters: tuple[str, ...]
    left: tuple[tuple[str, str], ...]
    bytes_before: int
    bytes_after: int

    def __str__(self) -> str:
        sizes = " to ".join(f"{size / 2**20:.1f}" for size in (self.bytes_before, self.bytes_after))
        lines = [f"quantised {len(self.parameters)} weights of experts, from {sizes} MiB"]
        return "\n".join(lines + [f"  left {name}: {why}" for name, why in self.left])


def quantize_experts(
    model: nn.Module,
    quant_type: str = "nf4",
    *,
    blocksize: int = 64,
    workspace_mib: float = 256,
    double_quant: bool = False,
) -> QuantizedExperts:
    """Store the experts of a model in bitsandbytes' 4-bit blocks, expert by expert, in place.

    Before or after PEFT's adapters are put on them. Under `accelerate()` forward and backward
    dequantise groups of experts that have tokens, as many as the budget holds, and keep none.
    Without it PEFT makes all of them dense at every call. Which weight an expert has does not
    depend on how the model is run. The weights can't be merged into. PEFT's copies that train
    (`modules_to_save`) are left as they are. Modules that share a weight share the stored one.

    Args:
        model: A Transformers model, or a PeftModel of one.
        quant_type: "nf4" or "fp4".
        blocksize: Numbers that share a scale, 32 to 4096, a power of two.
        workspace_mib: Budget of the dense experts in MiB; one expert at a time is always made.
        double_quant: Whether the scales are stored in 8 bits, as in bitsandbytes: about 0.4 bits
            less for each number of a block of 64.

    Returns:
        What was quantised and what was left.

    Raises:
        TypeError, ValueError: an argument does not fit, the model has no experts that are known, or
            an adapter is merged into them.
        ImportError: bitsandbytes is not installed.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314),
    section 3: the NF4 blocks; bitsandbytes computes them.
    """
    storing = checked(_NAME, quant_type, blocksize, workspace_mib, double_quant)
    if not isinstance(model, nn.Module):
        raise checks.fail(TypeError, _NAME, "model", "a torch.nn.Module", type(model).__name__, "pass the model")
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.merged:
            remedy, got = "call unmerge_adapter() first", f"one with those of {name} merged"
            raise checks.fail(ValueError, _NAME, "model", "one without merged adapters", got, remedy)
    done = quantised(model, storing)
    if not done.parameters and not done.left:
        remedy = "pass a Transformers model with experts as 3-D parameters"
        got = f"a {type(model).__name__} without any that is not quantised yet"
        raise checks.fail(ValueError, _NAME, "model", "one with experts", got, remedy)
    return done


@torch.no_grad()
def quantised(model: nn.Module, storing: Storing) -> QuantizedExperts:
    """Store every weight of experts that is not stored yet."""
    left, names, before, after = list[tuple[str, str]](), list[str](), 0, 0
    shared = _shared(model)
    for name, module in model.named_modules():
        if not hasattr(module, "has_gate") and not is_quantised(module):  # Transformers sets it on experts modules
            continue
        reason = why_not_known(module)
        for each in () if reason else weights_of(module):
            weight = module._parameters.get(each)
            if isinstance(weight, PackedExperts):
                continue
            reason = "it is no parameter" if weight is None else why_not_stored(weight, each)
            if reason is None and weight is not None and weight.requires_grad and ".modules_to_save." in name:
                reason = "it trains (modules_to_save)"
            if weight is None or reason is not None:
                break
            made = shared.get(id(weight))
            if made is None:
                made = nn.Parameter(PackedExperts.quantised(weight, storing), requires_grad=False)
                before += weight.numel() * weight.itemsize
                after += made.held_bytes  # type: ignore[attr-defined]
            if id(weight) in shared:
                shared[id(weight)] = made
            del weight
            module._parameters[each] = made
            names.append(f"{name}.{each}")
        if reason is not None:
            left.append((name, reason))
    return QuantizedExperts(tuple(names), tuple(left), before, after)


def weights_of(experts: Any) -> tuple[str, str]:
    """Return the names of an experts module's weights."""
    return "gate_up_proj" if experts.has_gate else "up_proj", "down_proj"


def why_not_stored(weight: Tensor, name: str) -> str | None:
    """Say why a weight can't be stored in 4 bits, or None."""
    reason = why_not_local(weight, name)
    if reason is None and (weight.dim() != 3 or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16)):
        return f"its {name} is {weight.dim()}-dimensional, {weight.dtype}"
    return reason


def _shared(model: nn.Module) -> dict[int, nn.Parameter | None]:
    """Return the ids of parameters that several modules hold; what is made of each comes there."""
    every = [id(p) for module in model.modules() for p in module._parameters.values() if p is not None]
    return {each: None for each, count in Counter(every).items() if count > 1}


def checked(name: str, quant_type: Any, blocksize: Any, workspace_mib: Any, double_quant: Any) -> Storing:
    """Return how experts are to be stored, of a function's arguments."""
    if quant_type not in QUANT_TYPES:
        raise checks.fail(ValueError, name, "quant_type", f"one of {QUANT_TYPES}", repr(quant_type), "pass 'nf4'")
    if not isinstance(blocksize, int) or blocksize not in BLOCK_SIZES:
        raise checks.fail(ValueError, name, "blocksize", f"one of {BLOCK_SIZES}", repr(blocksize), "pass 64")
    if checks.number(name, "workspace_mib", workspace_mib) <= 0:
        raise checks.fail(ValueError, name, "workspace_mib", "above 0", workspace_mib, "pass a number of MiB")
    if not isinstance(double_quant, bool):
        raise checks.fail(TypeError, name, "double_quant", "True or False", repr(double_quant), "pass True")
    return Storing(quant_type, blocksize, workspace_mib, double_quant)
