"""What runs where: the backends, the choice among them, and the reason when one can't run.

A backend is a module with one function for each op of `ops.py` and `supports(call)`, which returns None or why not.
"""

import importlib
import importlib.util
import logging
import os
import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from types import ModuleType
from typing import TYPE_CHECKING

import torch

from delora_kernels.backends import proof

if TYPE_CHECKING:
    from delora_kernels.call import AnyCall

logger = logging.getLogger(__name__)

NAMES = ("triton", "cuda", "eager")
"""Every backend name, in the order an automatic choice tries them."""

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_BACKEND"

_MODULES = {
    "triton": "delora_kernels.backends.triton",
    "cuda": "delora_kernels.backends.cuda",
    "eager": "delora_kernels.backends.eager",
}
_loaded: dict[str, ModuleType] = {}
_unavailable: dict[str, str | None] = {}
_logged: set[tuple[str, str]] = set()
_proving_in: dict[int, str] = {}


_requested: str | None = os.environ.get(ENVIRONMENT_VARIABLE) or None


def load(name: str) -> ModuleType:
    """The module of the backend `name`, imported on first use."""
    if name not in _loaded:  # a dict look-up is what torch.compile can trace
        _loaded[name] = importlib.import_module(_MODULES[name])
    return _loaded[name]


def unavailable(name: str) -> str | None:
    """Why the backend `name` can't run on this machine at all, or None if it can; found out once."""
    if name not in _unavailable:  # a dict look-up is what torch.compile can trace
        _unavailable[name] = _why_not_here(name)
    return _unavailable[name]


def _why_not_here(name: str) -> str | None:
    if name == "cuda" and (reason := load(name).why_not_here()) is not None:
        return str(reason)
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (with TRITON_INTERPRET=1 its kernels run on CPU tensors, slowly, on request)"
    load(name)  # here, because torch.compile can't trace an import
    return None


# Nor can it trace how the answer is found: it takes it as a constant. torch.compiler's function for that imports a lot.
_why_not_here._dynamo_marked_constant = True  # type: ignore[attr-defined]


def reason_against(name: str, call: "AnyCall") -> str | None:
    """Why the backend `name` can't take `call`, or None if it can."""
    return unavailable(name) or load(name).supports(call)


def reason_unasked(name: str, call: "AnyCall") -> str | None:
    """Why an automatic choice leaves alone a backend that can take `call`, or None if it does not."""
    if name == "eager":
        return None
    if call.x.device.type == "cpu":
        return f"on a CPU its kernels are for tests: ask for them with use_backend({name!r})"
    return proof.why_not(name, call)


def requested() -> str | None:
    """The backend asked for by `use_backend` or by the environment variable, or None for an automatic choice."""
    return None if _requested is None else _known(_requested, ENVIRONMENT_VARIABLE)


def choose(call: "AnyCall") -> str:
    """The name of the backend that takes `call`.

    Raises:
        RuntimeError: the requested backend can't take the call; the text says why.
    """
    name = _proving() or requested()
    if name is not None:
        reason = reason_against(name, call)
        if reason is not None:
            raise RuntimeError(
                f"{call.method}: the backend {name!r} was requested but can't take this call: {reason}. "
                f"Use use_backend('eager'), or leave the choice open."
            )
        return name
    for name in NAMES:
        reason = reason_against(name, call) or reason_unasked(name, call)
        if reason is None:
            return name
        _log_once(name, reason)
    raise RuntimeError(f"{call.method}: no backend takes this call")


def use_backend(name: str) -> AbstractContextManager[None]:
    """A context in which every call runs on one backend, its backward pass too (process-wide, not per thread).

    Args:
        name: "eager", "triton" or "cuda". A call that the backend can't take raises instead of falling back.

    Raises:
        ValueError: `name` is no backend.
        RuntimeError: the backend can't run on this machine; the text says why.
    """
    reason = unavailable(_known(name, "use_backend: name"))
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
    """A context in which the calls of this thread, and of no other, run on one backend."""
    _proving_in[threading.get_ident()] = name
    try:
        yield
    finally:
        del _proving_in[threading.get_ident()]


def _known(name: str, where: str) -> str:
    if name not in NAMES:
        raise ValueError(f"{where} must be one of {', '.join(map(repr, NAMES))}, got {name!r}")
    return name


def _log_once(name: str, reason: str) -> None:
    if not torch.compiler.is_compiling() and (name, reason) not in _logged:
        _logged.add((name, reason))
        logger.debug("backend %s not used: %s", name, reason)
