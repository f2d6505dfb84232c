"""Backends that run on a CPU with eager's ops and are open to an automatic choice there, in the
place of those that need a GPU: a test makes one of them wrong.
"""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from delora_kernels import backends, dispatch, ops
from delora_kernels.backends import eager
from delora_kernels.diagnostics import proof

Op = Callable[..., Any]


def put_in_place(patch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Put one in the place of every backend, none of them proved yet; name → its namespace."""
    loaded = {
        name: SimpleNamespace(
            **{op: getattr(eager, op) for op in (*ops.NAMES, "wants_scaled")} | {"supports": lambda call: None}
        )
        for name in backends.NAMES
    }
    patch.setattr(backends, "loaded", loaded)
    patch.setattr(backends, "_unavailable", dict.fromkeys(backends.NAMES))
    patch.setattr(dispatch, "_logged", set())
    patch.setattr(dispatch, "_requested", None)
    for name in ("_verdicts", "_put_off", "_before", "_seconds"):
        patch.setattr(proof, name, {})
    patch.setattr(dispatch, "is_open_to", lambda name, device_type: True)
    return loaded


def wrong(op: Op, result: int, by: float) -> Op:
    """The op with one result off."""

    def changed(*given: Any) -> Any:
        results = op(*given)
        return tuple(each * by if i == result else each for i, each in enumerate(results))

    return changed
