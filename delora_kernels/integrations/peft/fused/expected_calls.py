"""The calls that a fused layer will make, as far as they are known before it is called: what their
kernels are proved on.

x is two tokens in the dtype that the base multiplies; autocast is that around the caller, as in a
forward pass.
"""

from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels.bases.read import base_in
from delora_kernels.bases.stored import StoredBase
from delora_kernels.call import AnyCall
from delora_kernels.diagnostics.taken import call_made_by
from delora_kernels.functional.grouped import routed_call
from delora_kernels.integrations.peft.fused.experts import plan_of_experts
from delora_kernels.integrations.peft.fused.experts_block import Projection
from delora_kernels.integrations.peft.fused.stored_bases import StoredRun
from delora_kernels.integrations.peft.fused.variants import ActivatedRun, ArrowRun
from delora_kernels.integrations.peft.verdict import Verdict

TOKENS = 2


def calls_of(layer: nn.Module, verdict: Verdict, outer: nn.Module | None) -> list[AnyCall]:
    """Return the calls of a fused layer, with dropout and without where it can drop; none where
    they are not known.

    Args:
        layer: The layer.
        verdict: How it runs.
        outer: The outermost wrapper of the experts that it adapts, which makes the calls of all.
    """
    if verdict.reason is not None:
        return []
    try:
        calls = [_of_linear(layer, verdict.run)] if outer is None else list(_of_experts(outer))
    except (TypeError, ValueError, RuntimeError):  # a call that would raise: the layer's own says so
        return []
    found = [call for call in calls if call is not None]
    return found + [_otherwise(call) for call in found if _may_drop(layer) and hasattr(call, "seed")]


def _may_drop(layer: Any) -> bool:
    """Whether a layer drops in training: by a module, or by an option of the library's own
    methods.
    """
    modules = any(isinstance(module, nn.Dropout) and module.p > 0 for module in layer.modules())
    return modules or any(getattr(config, "dropout", 0) for config in getattr(layer, "options", {}).values())


def _of_linear(layer: Any, run: Any) -> AnyCall | None:
    """Return the call that a linear makes of x, without running it."""
    base = base_in(layer.get_base_layer())
    if run is None and hasattr(type(layer), "fused_method"):
        run = layer.forward  # of the library's own methods
    run = run.run if isinstance(run, StoredRun) else run
    if run is None or isinstance(base, str) or isinstance(run, ActivatedRun | ArrowRun):
        return None  # a variant's first call makes what it needs of the weights, which is not to happen here
    dtype = base.weight.dtype
    if isinstance(base, StoredBase) and base.compute_dtype is None:
        if type(base).computes_in is not StoredBase.computes_in:
            return None  # its first call settles the dtype, which is not to happen here
    x = torch.empty(TOKENS, base.shape[1], dtype=dtype, device=base.device)
    with torch.random.fork_rng([x.device] if x.is_cuda else []):  # a seed may be drawn
        return call_made_by(run, x)


def _of_experts(layer: nn.Module) -> Iterator[AnyCall]:
    plan = plan_of_experts(layer)
    if isinstance(plan, str):
        return
    with torch.autocast(plan.up.weight.device.type, enabled=False) if plan.by_weight else nullcontext():
        for each in (plan.up, plan.down):
            if each.A is not None and each.B is not None:
                yield _of_projection(each, (each.A, each.B, each.scale))


def _of_projection(projection: Projection, factors: tuple[Tensor, Tensor, float]) -> AnyCall:
    weight = projection.weight
    x = torch.empty(TOKENS, weight.shape[2], dtype=weight.dtype, device=weight.device)
    offsets = torch.full((weight.shape[0],), TOKENS, device=weight.device)
    return routed_call(x, weight, projection.bias, factors, offsets)


def _otherwise(call: AnyCall) -> AnyCall:
    """Return the call in the other mode: it drops where this one does not."""
    given: Any = call
    seed = None if given.seed is not None else torch.zeros((), dtype=torch.int64, device=given.x.device)
    made: AnyCall = given._replace(seed=seed)
    return made
