"""The additive methods for who has checked the arguments already: eager arithmetic of one dtype on
a CPU.

The functions of this folder check, choose a backend and dtypes, and then run; whoever has seen all
of that at a glance (integrations/peft/fused/straight.py) comes here.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import _C, Tensor

from delora_kernels.autograd import function
from delora_kernels.autograd.function import unseen
from delora_kernels.autograd.low_rank import StraightLinear
from delora_kernels.autograd.low_rank_direct import ops_replaced
from delora_kernels.autograd.shared_input_direct import shared_direct
from delora_kernels.call import Call, Options
from delora_kernels.dispatch import is_left_open, requested

_EPS = 1e-4


def unwatched(x: Any) -> bool:
    """Whether nobody sees it, x is on the CPU, no cast is asked for and no backend."""
    return not (
        not unseen()  # first, where a compiler reads this
        or not getattr(x, "is_cpu", False)
        or torch.is_autocast_enabled("cpu")
        or not is_left_open()
        or ops_replaced()
    )


def surroundings(x: Tensor) -> tuple[Any, ...]:
    """Return what besides tensors decides what a call of x computes and keeps, and where."""
    hooks = _C._autograd._top_saved_tensors_default_hooks(True)
    found = (x._version, x.requires_grad, x.dtype, x.shape, torch.is_grad_enabled(), hooks, requested())
    device = x.device.type
    if device == "cpu" and not torch.is_autocast_enabled(device):
        return found
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    stream = torch.cuda.current_stream(x.device) if x.is_cuda else None
    return (*found, autocast, stream, x.is_cuda and torch.cuda.is_current_stream_capturing())


@lru_cache(maxsize=256)
def _options(method: str, scale: float, eps: float, dtype: torch.dtype) -> Options:
    return Options(method, scale, eps, (), (0.0,), False, False, 0, dtype, dtype)


def all_trained(training: bool, *trained: Tensor) -> bool:
    """Whether the gradient of each of `trained` is wanted, or none is.

    In training a pass without gradients is judged as one with them: reentrant checkpointing runs it
    again so, and is to find the same bits.

    Args:
        training: Whether their layer is in training.
        trained: Its factors and vectors.
    """
    if not (training or torch.is_grad_enabled()):
        return True
    for tensor in trained:  # noqa: SIM110  # a generator takes twice as long, at every call
        if not tensor.requires_grad:
            return False
    return True


def straight_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    lam: Tensor | None = None,
    weight_norm: Tensor | None = None,
) -> Call:
    """Make the call of `lora_linear`, with a magnitude `dora_linear`, with λ `delora_linear` with
    PEFT's clamp; x as it came, [..., K].
    """
    if lam is not None:
        o = _options("delora_linear", 1.0, _EPS, x.dtype)
    else:
        o = _options("lora_linear" if magnitude is None else "dora_linear", scale, 0.0, x.dtype)
    return Call(x, weight, bias, A, B, magnitude, lam, weight_norm, None, None, None, None, o)


def run_straight(call: Call) -> Tensor:
    """Run it: [..., K] → [..., N]."""
    return function.run(StraightLinear, call, "eager", call.x.shape)[0]


def run_shared(calls: Sequence[Call]) -> tuple[Tensor, ...]:
    """Run calls of one x as one: y_i [..., N_i] of each."""
    return shared_direct(calls)
