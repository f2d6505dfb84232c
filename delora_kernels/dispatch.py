"""Which backend takes a call: the one asked for, or the first that can and has shown that it is
right; or why none.
"""

import logging
import os
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch

from delora_kernels import backends
from delora_kernels.call import AnyCall

logger = logging.getLogger(__name__)

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_BACKEND"

_requested: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None
_logged: set[tuple[str, str]] = set()
_proving_in: dict[int, str] = {}


def _nothing_to_prove(name: str, call: AnyCall) -> str | None:
    return None


unproved: Callable[[str, AnyCall], str | None] = _nothing_to_prove
"""Why kernels that nobody asked for are not known to be right on the call's device; the package
hands in proof.py's.
"""


def reason_against(name: str, call: AnyCall) -> str | None:
    """Say why the backend `name` can't take `call`, or None if it can."""
    return backends.unavailable(name) or backends.load(name).supports(call)


def reason_unasked(name: str, call: AnyCall) -> str | None:
    """Say why an automatic choice leaves alone a backend that can take `call`, or None if it does
    not.
    """
    if name == "eager":
        return None
    if not is_open_to(name, call.x.device.type):
        return f"on a CPU its kernels are for tests: ask for them with use_backend({name!r})"
    return unproved(name, call)


def is_open_to(name: str, device_type: str) -> bool:
    """Whether an automatic choice considers a backend on a device: kernels not on a CPU."""
    return name == "eager" or device_type != "cpu"


def requested() -> str | None:
    """Return the backend asked for by `use_backend` or the environment variable, or None for an
    automatic choice.
    """
    return None if _requested is None else _known(_requested, ENVIRONMENT_VARIABLE)


def is_left_open() -> bool:
    """Whether nobody has asked for a backend, and none is being proved."""
    return _requested is None and not _proving_in


def is_proving() -> bool:
    """Whether a backend is being proved, on any thread."""
    return bool(_proving_in)


def choose(call: AnyCall) -> str:
    """Return the name of the backend that takes `call`.

    Raises:
        RuntimeError: the requested backend can't take the call; the text says why.
    """
    name = _proving() or requested()
    if name == NOBODY:
        raise CallMade(call)
    if name is not None:
        reason = reason_against(name, call)
        if reason is not None:
            raise RuntimeError(
                f"{call.options.method}: the backend {name!r} was requested but can't take this call: {reason}. "
                f"Use use_backend('eager'), or leave the choice open."
            )
        return name
    for name in backends.NAMES:
        reason = backends.unavailable(name) or backends.load(name).supports(call)
        if reason is None and (name == "eager" or (reason := reason_unasked(name, call)) is None):
            return name
        if not torch.compiler.is_compiling() and (name, reason) not in _logged:
            _logged.add((name, str(reason)))
            logger.debug("backend %s not used: %s", name, reason)
    raise RuntimeError(f"{call.options.method}: no backend takes this call")


def use_backend(name: str) -> AbstractContextManager[None]:
    """Make a context in which every call runs on one backend, its backward pass too (process-wide,
    not per thread).

    Args:
        name: "eager", "triton" or "cuda". A call that the backend can't take raises instead of
            falling back.

    Raises:
        ValueError: `name` is no backend.
        RuntimeError: the backend can't run on this machine; the text says why.
    """
    reason = backends.unavailable(_known(name, "use_backend: name"))
    if reason is not None:
        raise RuntimeError(f"use_backend({name!r}): {reason}. `python -m delora_kernels` lists what runs here.")
    return _using(name)


@contextmanager
def _using(name: str) -> Iterator[None]:
    global _requested
    previous, _requested = _requested, name
    try:
        yield
    finally:
        _requested = previous


def _proving() -> str | None:
    return _proving_in.get(threading.get_ident())


# torch.compile is to guard on nothing here: what it traces is no proof.
_proving._dynamo_marked_constant = True  # type: ignore[attr-defined]


@contextmanager
def proving(name: str) -> Iterator[None]:
    """Make a context in which the calls of this thread, and of no other, run on one backend."""
    _proving_in[threading.get_ident()] = name
    try:
        yield
    finally:
        del _proving_in[threading.get_ident()]


class CallMade(Exception):
    """The call that a function made, in the place of running it.

    Args:
        call: The call.
    """

    def __init__(self, call: AnyCall) -> None:
        super().__init__()
        self.call = call


NOBODY = "nobody"
"""In the place of a backend that is being proved: calls are made, and raised as `CallMade`."""


def _known(name: str, where: str) -> str:
    if name not in backends.NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, backends.NAMES))}, got {name!r}")
    return name
