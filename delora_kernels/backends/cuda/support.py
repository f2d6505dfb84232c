"""Where the compiled kernels run at all, and which calls they take."""

import torch

from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.backends.cuda.launch import FUNCTIONS, on_host
from delora_kernels.call import AnyCall, GroupedCall, MoECall

MOST_EXPERTS = 512
"""What `dk_route` holds of one token in shared memory."""
MOST_GROUPS = 4096
"""Experts of a grouped call, whose offsets every block looks through."""

_against: dict[tuple[str, int | None], str | None] = {}
"""Type and index of a device → why they can't run on it; filled by `why_not_here`."""


def why_not_here() -> str | None:
    """Why they can't run on this machine, or None; what each of its devices lacks is found out with
    it.
    """
    reason = cuda_library.why_not_here(FUNCTIONS)
    if reason is None:
        gpus = range(0 if on_host() else torch.cuda.device_count())
        for device in (torch.device("cpu"), *(torch.device("cuda", index) for index in gpus)):
            _against[device.type, device.index] = _why_not_on(device)
    return reason


def supports(call: AnyCall) -> str | None:
    """Why the compiled kernels can't take `call`, or None."""
    device, o = call.x.device, call.options
    key = (device.type, device.index)  # torch.compile can trace a dict look-up, and not what fills it
    reason = _against.get(key, f"its tensors are on {device.type}")
    if reason is not None:
        return reason
    if torch.float64 in (o.compute_dtype, o.rank_dtype):
        return "float64 has no fast units"
    if isinstance(call, MoECall) and len(call.B) > MOST_EXPERTS:
        return f"{len(call.B)} experts are more than {MOST_EXPERTS}"
    if isinstance(call, GroupedCall) and call.weight.shape[0] > MOST_GROUPS:
        return f"{call.weight.shape[0]} experts are more than {MOST_GROUPS}"
    return None


def _why_not_on(device: torch.device) -> str | None:
    if device.type != ("cpu" if on_host() else "cuda"):
        return f"its tensors are on {device.type}"
    if device.type == "cpu":
        return None
    return cuda_library.why_not_capability(cuda_library.build_info(), torch.cuda.get_device_capability(device))
