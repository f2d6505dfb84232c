"""What convolutions and embeddings are judged by alike: layers whose base runs as it is, and whose
adapters are added to it by torch's own operations.
"""

import math
from collections.abc import Callable
from functools import partial
from numbers import Real
from typing import Any

from torch import Tensor, nn

from delora_kernels.bases.plain import any_module_has_hooks, has_other_forward, why_not_plain
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.plan import why_not_class
from delora_kernels.integrations.peft.fused.stored_bases import why_not_peft
from delora_kernels.integrations.peft.verdict import DISABLED, INACTIVE, MERGED, State, Verdict, log_once

Fused = Callable[[Tensor], Tensor]


def verdict_in_torch(plan: Fused | str) -> Verdict:
    """Return the verdict of a plan, or of the reason why there is none."""
    return Verdict(State.OWN_FORWARD, plan) if isinstance(plan, str) else Verdict(State.FUSED, None, plan)


def plan_in_torch(
    layer: Any, kind: type, known: Any, read: Callable[[Any, str], Any], run: Callable[..., Tensor]
) -> Fused | str:
    """Find what computes a layer from its input, or the reason why it must be PEFT's own forward.

    Args:
        layer, kind, known: As `why_not_now` takes them.
        read: (layer, name) → one active adapter, or the reason why it is not fused.
        run: (layer, adapters, x) → the output.
    """
    reason = why_not_now(layer, kind, known)
    if reason is not None:
        return reason
    adapters: list[Any] = []
    for name in layer.active_adapters:
        if name in known:
            adapter = read(layer, name)
            if isinstance(adapter, str):
                return adapter
            adapters.append(adapter)
    return partial(run, layer, adapters)


def why_not_now(layer: Any, kind: type, adapters: Any) -> str | None:
    """Say what a layer's state has against a fused run, or None.

    Args:
        layer: Of PEFT.
        kind: Its class there.
        adapters: Where it keeps its A, by adapter name.
    """
    reason = verdicts.reasons["lora"] or why_not_peft("convolutions and embeddings") or why_not_class(kind)
    if reason is not None:
        return reason
    if layer._disable_adapters:
        return DISABLED
    if layer.merged_adapters:
        return MERGED
    if has_other_forward(layer):
        return "it has a forward of its own"
    if any_module_has_hooks():
        return "hooks are registered for all modules"
    return None if any(name in adapters for name in layer.active_adapters) else INACTIVE


def why_not_scale(scale: Any) -> str | None:
    """Say why a scaling can't be one's factor, or None."""
    if not isinstance(scale, Real):
        return f"its scaling is a {type(scale).__name__}"
    return None if -math.inf < float(scale) < math.inf else "its scaling is not finite"


def gives_fresh_output(base: nn.Module, kinds: tuple[type, ...]) -> bool:
    """Tell whether what a call of the base returns is a new tensor that nobody else holds: it is a
    layer of torch's own, of one of `kinds`, with nothing put in its way.
    """
    return type(base) in kinds and why_not_plain(base, "base layer") is None and why_not_class(type(base)) is None


def run_fused(run: Fused, x: Tensor) -> Tensor:
    """Run what a plan found."""
    return run(x)


def run_in_torch(
    layer: Any,
    verdict: Verdict,
    why_not_call: Callable[..., str | None],
    peft_forward: Callable[..., Tensor],
    x: Tensor,
    args: Any,
    kwargs: dict[str, Any],
) -> Tensor:
    """Run a call fused, or by PEFT's own forward and say why in the log.

    Args:
        layer: The layer.
        verdict: On it.
        why_not_call: (layer, x) → why such an input needs PEFT's own forward, or None.
        peft_forward: That forward.
        x, args, kwargs: Of the call.
    """
    reason = verdict.reason
    if verdict.run is not None:
        more = args or any(value is not None for value in kwargs.values())
        reason = f"it is called with {', '.join(kwargs) or 'positional arguments'}" if more else why_not_call(layer, x)
        if reason is None:
            return run_fused(verdict.run, x)
    log_once("an accelerated layer runs PEFT's own forward", str(reason))
    return peft_forward(layer, x, *args, **kwargs)
