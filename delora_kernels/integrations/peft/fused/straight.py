"""The straight way through a fused layer on a CPU: one look at everything that plan.py judges, then
the arithmetic.

Most calls are of one adapter on a plain nn.Linear (look.py), with tensors of one dtype on a CPU and
nobody who watches. Whatever is not exactly so gives None, and plan.py judges it, with words. What
stands here must be no more than what plan.py would let pass, and give what its plan would:
tests/peft/fused/test_straight.py changes each thing that is read, one by one.
"""

import os
from typing import Any

from torch import Tensor, float32, float64, nn, strided

from delora_kernels.call import Call
from delora_kernels.functional.straight import all_trained, straight_call, unwatched
from delora_kernels.integrations.peft.fused.look import delora_parts, lora_parts

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_PLANS"

enabled = os.environ.get(ENVIRONMENT_VARIABLE) != "0"
"""Whether calls may be judged at one look; with DELORA_KERNELS_PLANS=0 in the environment plan.py
judges every call.
"""


def read_lora(layer: Any, x: Tensor, looked: bool = False) -> Call | None:
    """Read the call of a LoRA or DoRA linear, or None where plan.py has to judge it.

    Args:
        layer: The layer.
        x: Its input.
        looked: Whether it is known that nobody watches: of a sibling whose leader was just read.
    """
    parts = lora_parts(layer) if looked or (enabled and unwatched(x)) else None
    if parts is None:
        return None
    scale, weight, bias, A, B, magnitude = parts
    if not _fit(x, weight, bias, A, B):
        return None
    if magnitude is None:
        return straight_call(x, weight, bias, A, B, scale) if all_trained(layer.training, A, B) else None
    if magnitude.shape != (weight.shape[0],) or not _alike(magnitude, x):
        return None
    return (
        straight_call(x, weight, bias, A, B, scale, magnitude) if all_trained(layer.training, A, B, magnitude) else None
    )


def read_delora(layer: Any, x: Tensor, looked: bool = False) -> Call | None:
    """Read the call of a DeLoRA linear, or None where plan.py has to judge it; arguments as
    `read_lora`.
    """
    parts = delora_parts(layer) if looked or (enabled and unwatched(x)) else None
    if parts is None:
        return None
    rank, weight, bias, A, B, lam, norm = parts
    if not _fit(x, weight, bias, A, B) or rank != A.shape[0]:
        return None
    if lam.shape != (1,) or not _alike(lam, x):
        return None
    if type(norm) is not Tensor or norm.shape != (weight.shape[1],) or norm.requires_grad or not _alike(norm, x):
        return None
    return (
        straight_call(x, weight, bias, A, B, 1.0, None, lam, norm) if all_trained(layer.training, A, B, lam) else None
    )


def is_same_lora(layer: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a LoRA or DoRA linear is made of what a call was, that was read here; of its tensors
    no more is read than whether they are trained.

    Args:
        layer: The layer.
        inputs: All fields of the call but x.
    """
    parts = lora_parts(layer) if enabled else None
    if parts is None:
        return False
    scale, weight, bias, A, B, magnitude = parts
    same = A is inputs[2] and B is inputs[3] and weight is inputs[0] and bias is inputs[1]
    if not (same and magnitude is inputs[4] and scale == inputs[-1].scale):
        return False
    trained = (A, B) if magnitude is None else (A, B, magnitude)
    return all_trained(layer.training, *trained)


def is_same_delora(layer: Any, inputs: tuple[Any, ...]) -> bool:
    """Whether a DeLoRA linear is made of what a call was, as `is_same_lora`."""
    parts = delora_parts(layer) if enabled else None
    if parts is None:
        return False
    rank, weight, bias, A, B, lam, norm = parts
    same = A is inputs[2] and B is inputs[3] and weight is inputs[0] and bias is inputs[1]
    if not (same and lam is inputs[5] and norm is inputs[6] and rank == A.shape[0]):
        return False
    return all_trained(layer.training, A, B, lam)


def _fit(x: Tensor, weight: Any, bias: Any, A: Any, B: Any) -> bool:
    """Whether these are whole tensors of one dtype on the CPU that belong together."""
    if type(x) not in (Tensor, nn.Parameter) or x.dtype not in (float32, float64) or weight.requires_grad:
        return False
    if x.dim() < 2 or x.layout is not strided or x.is_nested or not x.is_cpu:
        return False
    dtype = x.dtype
    for each in (weight, A, B):
        if each.dtype is not dtype or not each.is_cpu or each.layout is not strided or each.dim() != 2:
            return False
    (N, K), r = weight.shape, A.shape[0]
    if x.shape[-1] != K or r == 0 or N == 0 or K == 0 or A.shape != (r, K) or B.shape != (N, r):
        return False
    return bias is None or (not bias.requires_grad and bias.shape == (N,) and _alike(bias, x))


def _alike(tensor: Tensor, x: Tensor) -> bool:
    return tensor.dtype is x.dtype and tensor.is_cpu and x.is_cpu and tensor.layout is strided
