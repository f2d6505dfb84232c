"""Which calls the compiled kernels take."""

import torch

from delora_kernels.backends.cuda.launch import on_host
from delora_kernels.call import Call, MoECall

MOST_EXPERTS = 512
"""What `dk_route` holds of one token in shared memory."""


def supports(call: Call | MoECall) -> str | None:
    """Why the compiled kernels can't take `call`, or None."""
    device, o = call.x.device, call.options
    if device.type != ("cpu" if on_host() else "cuda"):
        return f"its tensors are on {device.type}"
    if torch.float64 in (o.compute_dtype, o.rank_dtype):
        return "float64 has no fast units"
    if isinstance(call, MoECall) and len(call.B) > MOST_EXPERTS:
        return f"{len(call.B)} experts are more than {MOST_EXPERTS}"
    return None
