"""quantize_experts: the experts of a model in bitsandbytes' 4-bit blocks; its loader, and
Transformers', leave them in 16 bits.
"""

from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from delora_kernels import checks
from delora_kernels.bases.packed_experts import BLOCK_SIZES, QUANT_TYPES, PackedExperts
from delora_kernels.bases.plain import why_not_local
from delora_kernels.integrations.peft.fused.experts_known import why_not_known

_NAME = "quantize_experts"

torch.serialization.add_safe_globals([PackedExperts])  # for torch.load of a state dict


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


@torch.no_grad()
def quantize_experts(
    model: nn.Module, quant_type: str = "nf4", *, blocksize: int = 64, workspace_mib: float = 256
) -> QuantizedExperts:
    """Store the experts of a model in bitsandbytes' 4-bit blocks, expert by expert, in place.

    Before or after PEFT's adapters are put on them. Under `accelerate()` forward and backward
    dequantise groups of experts that have tokens, as many as the budget holds, and keep none.
    Without it PEFT makes all of them dense at every call. Which weight an expert has does not
    depend on how the model is run. The weights can't be merged into. PEFT's copies that train
    (`modules_to_save`) are left as they are.

    Args:
        model: A Transformers model, or a PeftModel of one.
        quant_type: "nf4" or "fp4".
        blocksize: Numbers that share a scale, 32 to 4096, a power of two.
        workspace_mib: Budget of the dense experts in MiB; one expert at a time is always made.

    Returns:
        What was quantised and what was left.

    Raises:
        TypeError, ValueError: an argument does not fit, the model has no experts that are known, or
            an adapter is merged into them.
        ImportError: bitsandbytes is not installed.

    Source: Dettmers et al., "QLoRA: Efficient Finetuning of Quantized LLMs" (arXiv:2305.14314),
    section 3: the NF4 blocks; bitsandbytes computes them.
    """
    _check(model, quant_type, blocksize, workspace_mib)
    left, names = list[tuple[str, str]](), list[str]()
    before = after = 0
    for name, module in model.named_modules():
        if isinstance(module, ParamWrapper) and module.merged:
            remedy, got = "call unmerge_adapter() first", f"one with those of {name} merged"
            raise checks.fail(ValueError, _NAME, "model", "one without merged adapters", got, remedy)
    for name, module in model.named_modules():
        if not hasattr(module, "has_gate"):  # which Transformers sets on every experts module
            continue
        reason = why_not_known(module)
        experts: Any = module
        for each in [] if reason else ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]:
            weight = module._parameters.get(each)
            if isinstance(weight, PackedExperts):
                continue
            reason = "it is no parameter" if weight is None else why_not_local(weight, each)
            if reason is None and weight is not None and (weight.dim() != 3 or weight.dtype == torch.float64):
                reason = f"its {each} is {weight.dim()}-dimensional, {weight.dtype}"
            if reason is None and weight is not None and weight.requires_grad and ".modules_to_save." in name:
                reason = "it trains (modules_to_save)"
            if weight is None or reason is not None:
                break
            before += weight.numel() * weight.itemsize
            packed = PackedExperts.quantised(weight, quant_type, blocksize, workspace_mib)
            del weight
            module._parameters[each] = nn.Parameter(packed, requires_grad=False)
            after += packed.packed.numel() + packed.absmax.numel() * 4
            names.append(f"{name}.{each}")
        if reason is not None:
            left.append((name, reason))
    if not names and not left:
        remedy = "pass a Transformers model with experts as 3-D parameters"
        got = f"a {type(model).__name__} without any that is not quantised yet"
        raise checks.fail(ValueError, _NAME, "model", "one with experts", got, remedy)
    return QuantizedExperts(tuple(names), tuple(left), before, after)


def _check(model: Any, quant_type: Any, blocksize: Any, workspace_mib: Any) -> None:
    if not isinstance(model, nn.Module):
        raise checks.fail(TypeError, _NAME, "model", "a torch.nn.Module", type(model).__name__, "pass the model")
    if quant_type not in QUANT_TYPES:
        raise checks.fail(ValueError, _NAME, "quant_type", f"one of {QUANT_TYPES}", repr(quant_type), "pass 'nf4'")
    if not isinstance(blocksize, int) or blocksize not in BLOCK_SIZES:
        raise checks.fail(ValueError, _NAME, "blocksize", f"one of {BLOCK_SIZES}", repr(blocksize), "pass 64")
    if checks.number(_NAME, "workspace_mib", workspace_mib) <= 0:
        raise checks.fail(ValueError, _NAME, "workspace_mib", "above 0", workspace_mib, "pass a number of MiB")
