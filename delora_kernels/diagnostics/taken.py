"""Which call a function makes, and which backend takes it as things stand: nothing is run, and
nothing proved.
"""

from collections.abc import Callable
from typing import Any

from delora_kernels import backends, dispatch
from delora_kernels.call import AnyCall
from delora_kernels.diagnostics import proof


def anything_to_prove(device_type: str, requested_too: bool) -> bool:
    """Whether calls on a device may have candidates; arguments as `candidates`."""
    if dispatch.requested() is not None:
        return requested_too
    return any(name != "eager" and dispatch.is_open_to(name, device_type) for name in backends.NAMES)


def candidates(call: AnyCall, requested_too: bool) -> list[str]:
    """Return the backends whose kernels an automatic choice would prove for a call, in its order.

    Args:
        call: The call.
        requested_too: Whether the backend that is asked for counts, which calls take unproved.
    """
    requested = dispatch.requested()
    if requested is not None:
        names = [requested] if requested_too and requested != "eager" else []
    else:
        names = [name for name in backends.NAMES if name != "eager" and dispatch.is_open_to(name, call.x.device.type)]
    return [name for name in names if dispatch.reason_against(name, call) is None]


def taken(call: AnyCall) -> str | None:
    """Return the backend that takes a call; of kernels that are not proved yet, that they will be
    right is taken for granted. None: the one that was asked for can't.
    """
    requested = dispatch.requested()
    if requested is not None:
        return requested if dispatch.reason_against(requested, call) is None else None
    for name in candidates(call, False):
        if proof.known_reason(name, call) is None:
            return name
    return "eager"


def call_made_by(function: Callable[..., Any], *args: Any) -> AnyCall | None:
    """Return the first call that a function makes, which ends it; None: it made none."""
    try:
        with dispatch.proving(dispatch.NOBODY):
            function(*args)
    except dispatch.CallMade as made:
        return made.call
    return None
