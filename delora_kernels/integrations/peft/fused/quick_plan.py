"""What plan.py would find for a layer, at one look: for kernels, and for whatever else is not the
straight way of a CPU.

A call on a GPU, under autocast or in 16 bits is one call of a public function, which plans it
(functional/planned.py). So it is enough to see that the layer is a usual one (look.py) and that its
tensors are whole, plain and on one device: what they are besides, the function checks or knows by
its plan. What is found is what plan.py finds, argument for argument, or nothing:
tests/peft/fused/test_quick_plan.py changes each thing that is read, one by one.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn, strided

from delora_kernels import functional
from delora_kernels.autograd.function import unseen
from delora_kernels.bases.stored import CASTABLE
from delora_kernels.checks import FLOATS
from delora_kernels.functional.planned import at_a_glance, may_be_planned
from delora_kernels.integrations.peft.fused import straight
from delora_kernels.integrations.peft.fused.groups import place_of, run_planned
from delora_kernels.integrations.peft.fused.look import delora_parts, lora_parts
from delora_kernels.integrations.peft.fused.one_call import PlannedRun

_FLOATS, _PLAIN = set(FLOATS), {Tensor, nn.Parameter}
_EPS = 1e-4
"""PEFT's clamp, and the function's default."""


def run_lora(layer: Any, x: Tensor) -> Tensor | None:
    """Run a LoRA or DoRA linear, or None where plan.py has to judge it.

    Args:
        layer: The layer.
        x: Its input.
    """
    parts = lora_parts(layer) if _is_usual(x) else None
    if parts is None:
        return None
    scale, weight, bias, A, B, magnitude = parts
    if _may_be_known(layer, x, weight):
        rest = () if magnitude is None else (magnitude,)
        name = "dora_linear" if rest else "lora_linear"
        _, y = at_a_glance(name, (x, weight, bias, A, B, *rest), 0.0, scale)
        if y is not None:
            return y
    found = _lora_run(x, *parts)
    return None if found is None else run_planned(layer, x, found)


def run_delora(layer: Any, x: Tensor) -> Tensor | None:
    """Run a DeLoRA linear, or None where plan.py has to judge it; arguments as `run_lora`."""
    parts = delora_parts(layer) if _is_usual(x) else None
    if parts is None:
        return None
    rank, weight, bias, A, B, lam, norm = parts
    if _may_be_known(layer, x, weight) and _are_strength(rank, A, lam, norm, x.device):
        _, y = at_a_glance("delora_linear", (x, weight, bias, A, B, None, lam, norm), 0.0, _EPS)
        if y is not None:
            return y if y.dtype is x.dtype else y.to(x.dtype)
    found = _delora_run(x, *parts)
    return None if found is None else run_planned(layer, x, found)


def lora_run(layer: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Find x → y of a LoRA or DoRA linear without running it, or None where plan.py has to judge
    it; arguments as `run_lora`.
    """
    parts = lora_parts(layer) if _is_usual(x) else None
    return None if parts is None else _lora_run(x, *parts)


def delora_run(layer: Any, x: Tensor) -> PlannedRun | None:
    """Find x → y of a DeLoRA linear without running it, or None where plan.py has to judge it;
    arguments as `run_lora`.
    """
    parts = delora_parts(layer) if _is_usual(x) else None
    return None if parts is None else _delora_run(x, *parts)


def _lora_run(
    x: Tensor, scale: float, weight: Any, bias: Any, A: Any, B: Any, magnitude: Any
) -> Callable[[Tensor], Tensor] | None:
    if not _fit(x, weight, bias, A, B):
        return None
    arguments = {"weight": weight, "A": A, "B": B, "scale": scale, "bias": bias, "dropout_p": 0.0}
    if magnitude is None:
        return PlannedRun(functional.lora_linear, functional.CALLS["lora_linear"], arguments)
    if not _is_whole(magnitude, 1, x.device):
        return None
    return partial(functional.dora_linear, magnitude=magnitude, **arguments)


def _delora_run(x: Tensor, rank: int, weight: Any, bias: Any, A: Any, B: Any, lam: Any, norm: Any) -> PlannedRun | None:
    if not (_fit(x, weight, bias, A, B) and _are_strength(rank, A, lam, norm, x.device)):
        return None
    arguments = {"weight": weight, "A": A, "B": B, "lam": lam, "weight_norm": norm, "bias": bias, "dropout_p": 0.0}
    return PlannedRun(functional.delora_linear, functional.CALLS["delora_linear"], arguments, True)


def _is_usual(x: Any) -> bool:
    """Whether x is plain memory, and no compiler reads this."""
    return (
        not torch.compiler.is_compiling()
        and straight.enabled
        and x.__class__ in _PLAIN
        and (x.is_cuda or x.is_cpu)
        and not x.is_nested
    )


def _may_be_known(layer: Any, x: Tensor, weight: Tensor) -> bool:
    """Whether the call may be planned: of a layer that runs alone, and of a base that takes x."""
    place = place_of(layer)
    return (
        may_be_planned(x)
        and (place is None or (place.group is None and not place.family.watched))
        and _takes(weight, x)
    )


def _takes(weight: Tensor, x: Tensor) -> bool:
    """Whether x is of a dtype that a base of this weight takes."""
    if x.dtype is weight.dtype:
        return True
    return x.dtype in CASTABLE and weight.dtype in CASTABLE and torch.is_autocast_enabled(x.device.type)


def _fit(x: Tensor, weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether nobody watches, and these are whole tensors on one device, x of a dtype that the base
    takes.
    """
    device = x.device
    return (
        unseen()
        and x.layout is strided
        and x.dim() > 1
        and _is_whole(weight, 2, device)
        and _is_whole(A, 2, device)
        and _is_whole(B, 2, device)
        and (bias is None or _is_whole(bias, 1, device))
        and _takes(weight, x)
    )


def _are_strength(rank: int, A: Tensor, lam: Tensor, norm: Any, device: torch.device) -> bool:
    """Whether λ and the weight's norms are whole, and A of the rank that PEFT's forward divides
    by.
    """
    return (
        A.dim() == 2
        and A.shape[0] == rank
        and _is_whole(lam, 1, device)
        and type(norm) is Tensor
        and _is_whole(norm, 1, device)
        and not norm.requires_grad
        and norm.data_ptr() != 0
    )


def _is_whole(tensor: Tensor, dim: int, device: torch.device) -> bool:
    """Whether it is all that its owner means: no shard, no stored form, nothing left empty."""
    return (
        tensor.dtype in _FLOATS
        and tensor.layout is strided
        and tensor.dim() == dim
        and tensor.numel() > 0
        and tensor.device == device
    )
