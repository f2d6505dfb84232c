"""The backends that run the ops: which there are, and why one can't run on this machine.

A backend is a module with one function for each op of `ops.py` and `supports(call)`, which returns
None or why not. `dispatch.py` chooses among them.
"""

import importlib
import importlib.util
import os
from types import ModuleType

import torch

from delora_kernels.backends import eager

NAMES = ("triton", "cuda", "eager")
"""Every backend name, in the order an automatic choice tries them."""

_MODULES = {"triton": "delora_kernels.backends.triton", "cuda": "delora_kernels.backends.cuda"}
loaded: dict[str, ModuleType] = {"eager": eager}
"""The modules of the backends that were asked for."""

_unavailable: dict[str, str | None] = {}


def load(name: str) -> ModuleType:
    """Return the module of the backend `name`, imported on first use."""
    if name not in loaded:  # a dict look-up is what torch.compile can trace
        loaded[name] = importlib.import_module(_MODULES[name])
    return loaded[name]


def unavailable(name: str) -> str | None:
    """Say why the backend `name` can't run on this machine at all, or None if it can; found out
    once.
    """
    if name not in _unavailable:
        _unavailable[name] = _why_not_here(name)
    return _unavailable[name]


# A constant of what torch.compile traces: it can trace no import, and is to guard on no dict that a
# first call fills. torch.compiler's function for that imports a lot.
unavailable._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _why_not_here(name: str) -> str | None:
    if name == "cuda" and (reason := load(name).why_not_here()) is not None:
        return str(reason)
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if name == "triton" and not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no GPU (with TRITON_INTERPRET=1 its kernels run on CPU tensors, slowly, on request)"
    load(name)  # here, because torch.compile can't trace an import
    return None
