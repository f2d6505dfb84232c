"""What computes an adapter layer as it stands now, and why: asked by its call, by accelerate's
report and by strict.

A layer of this library answers by its own `verdict()`; `fused/plan.py` answers for PEFT's.
"""

import enum
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels.bases.read import base_in

logger = logging.getLogger(__name__)


class State(str, enum.Enum):
    """How much of a layer runs fused."""

    FUSED = "fused"
    RANK_TERM = "rank term fused"
    """The base layer runs its own forward, and the adapter's term, fused, is added."""
    OWN_FORWARD = "own forward"
    EXPECTED = "expected"
    """Before a model is loaded: to be fused if the base's numbers are those of its dense form."""


class Verdict(NamedTuple):
    """How a layer runs as it stands.

    Args:
        state: How much of it is fused.
        reason: Why not all of it is; None: it is.
        run: x → y of a layer that is fused by accelerate; None of any other, and of the library's
            own methods.
    """

    state: State
    reason: str | None = None
    run: Callable[[Tensor], Tensor] | None = None


DISABLED, MERGED, INACTIVE = "its adapters are disabled", "its adapter is merged", "it has no active adapter"
ON_PURPOSE = (DISABLED, MERGED, INACTIVE)
"""Reasons that a user brings about on purpose: nothing to log."""


def verdict_of_own(layer: Any, names: list[str], otherwise: State) -> Verdict:
    """Judge a layer of this library's own methods.

    Args:
        layer: The layer.
        names: Its active adapters.
        otherwise: What it does where its base can't be read.
    """
    if layer.disable_adapters:
        return Verdict(State.OWN_FORWARD, DISABLED)
    if layer.merged:
        return Verdict(State.OWN_FORWARD, MERGED)
    if not names:
        return Verdict(State.OWN_FORWARD, INACTIVE)
    base = base_in(layer.base_layer)
    if isinstance(base, str):
        return Verdict(otherwise, base)
    if len(names) > 1:
        return Verdict(otherwise, f"it has {len(names)} active adapters, of which one runs with the base weight")
    return Verdict(State.FUSED)


_logged: set[tuple[str, str]] = set()


@torch.compiler.assume_constant_result  # a compiler that meets a call makes it once, while it traces
def log_once(what: str, reason: str) -> None:
    """Log that `what` happens for `reason`, unless that is on purpose or has been said."""
    if reason not in ON_PURPOSE and (what, reason) not in _logged:
        _logged.add((what, reason))
        logger.warning("%s: %s", what, reason)
