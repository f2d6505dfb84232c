"""Which calls the Triton backend takes."""

import torch

from delora_kernels.backends.triton.launch import INTERPRETED
from delora_kernels.call import AnyCall, Call, GroupedCall, MoECall, ReflectCall

LARGEST_RANK = 512
MOST_EXPERTS = 1023
"""Every program of a grouped kernel looks through all experts' offsets."""


def supports(call: AnyCall) -> str | None:
    """Why Triton can't take `call`, or None."""
    device, o = call.x.device, call.options
    if device.type != ("cpu" if INTERPRETED else "cuda"):
        return f"its tensors are on {device.type}"
    if torch.float64 in (o.compute_dtype, o.rank_dtype):
        return "float64 has no fast units"
    if isinstance(call, GroupedCall) and call.weight.shape[0] > MOST_EXPERTS:
        return f"{call.weight.shape[0]} experts are more than {MOST_EXPERTS}"
    rank = 0 if isinstance(call, ReflectCall) else _rank(call)
    if rank > LARGEST_RANK:
        return f"rank {rank} is above {LARGEST_RANK}"
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return "the GPU is older than sm_80"
    return None


def _rank(call: Call | MoECall | GroupedCall) -> int:
    """Return the columns of h, or of v where a mixture's are more."""
    if isinstance(call, GroupedCall):
        return 0 if call.A is None else call.A.shape[1]
    if isinstance(call, Call):
        return call.A.shape[0] + (0 if call.frozen_A is None else call.frozen_A.shape[0])
    E, _, r = call.B.shape
    start = 0 if call.frozen_A is None else call.frozen_A.shape[0] * call.frozen_A.shape[1]
    return E * r + (0 if call.router is None else E) + start
