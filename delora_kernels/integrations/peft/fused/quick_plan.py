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
from delora_kernels.integrations.peft.fused import straight
from delora_kernels.integrations.peft.fused.look import delora_parts, lora_parts
from delora_kernels.integrations.peft.fused.one_call import PlannedRun

_FLOATS, _PLAIN = set(FLOATS), {Tensor, nn.Parameter}


def lora_run(layer: Any, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Find x → y of a LoRA or DoRA linear, or None where plan.py has to judge it.

    Args:
        layer: The layer.
        x: Its input.
    """
    parts = lora_parts(layer) if _is_usual(x) else None
    if parts is None:
        return None
    scale, weight, bias, A, B, magnitude = parts
    if not _fit(x, weight, bias, A, B):
        return None
    arguments = {"weight": weight, "A": A, "B": B, "scale": scale, "bias": bias, "dropout_p": 0.0}
    if magnitude is None:
        return PlannedRun(functional.lora_linear, functional.CALLS["lora_linear"], arguments)
    if not _is_whole(magnitude, 1, x.device):
        return None
    return partial(functional.dora_linear, magnitude=magnitude, **arguments)


def delora_run(layer: Any, x: Tensor) -> PlannedRun | None:
    """Find x → y of a DeLoRA linear, or None where plan.py has to judge it; arguments as
    `lora_run`.
    """
    parts = delora_parts(layer) if _is_usual(x) else None
    if parts is None:
        return None
    rank, weight, bias, A, B, lam, norm = parts
    if not _fit(x, weight, bias, A, B) or rank != A.shape[0] or not _is_whole(lam, 1, x.device):
        return None
    if not _is_whole(norm, 1, x.device, Tensor) or norm.requires_grad or not norm.data_ptr():
        return None
    arguments = {"weight": weight, "A": A, "B": B, "lam": lam, "weight_norm": norm, "bias": bias, "dropout_p": 0.0}
    return PlannedRun(functional.delora_linear, functional.CALLS["delora_linear"], arguments, True)


def _is_usual(x: Any) -> bool:
    """Whether x is plain memory, and nobody watches what is made of it."""
    return (
        not torch.compiler.is_compiling()
        and straight.enabled
        and x.__class__ in _PLAIN
        and (x.is_cuda or x.is_cpu)
        and x.layout is strided
        and x.dim() > 1
        and not x.is_nested
        and unseen()
    )


def _fit(x: Tensor, weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether these are whole tensors on one device, x of a dtype that the base takes."""
    device = x.device
    if not (_is_whole(weight, 2, device) and _is_whole(A, 2, device) and _is_whole(B, 2, device)):
        return False
    if bias is not None and not _is_whole(bias, 1, device):
        return False
    if x.dtype is weight.dtype:
        return True
    return torch.is_autocast_enabled(device.type) and x.dtype in CASTABLE and weight.dtype in CASTABLE


def _is_whole(tensor: Any, dim: int, device: torch.device, kind: Any = nn.Parameter) -> bool:
    """Whether it is all that its owner means: no shard, no stored form, nothing left empty."""
    return (
        type(tensor) is kind
        and tensor.dtype in _FLOATS
        and tensor.layout is strided
        and tensor.dim() == dim
        and tensor.numel() > 0
        and tensor.device == device
    )
