"""The autograd Functions of every additive method: y = c ⊙ (x Wᵀ + scale · drop(x) Âᵀ B̂ᵀ) + bias.

`AdaptedLinear` takes every call: in stages that a backend runs (low_rank_stages.py), or where only
the arithmetic of one dtype is left to do, in straight torch calls (low_rank_direct.py).
`StraightLinear` is for who has seen that for himself.
"""

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd.function import differentiable
from delora_kernels.autograd.low_rank_direct import direct, ops_replaced
from delora_kernels.autograd.low_rank_stages import Saved, compute, gradients
from delora_kernels.backends import eager
from delora_kernels.call import Call

_DTYPES = (torch.float32, torch.float64)


def is_plain(call: Call, backend: str) -> bool:
    """Whether a call of the eager backend asks for no more than arithmetic, and nobody watches it
    (a compiler, a mode).
    """
    o, dtype = call.options, call.x.dtype
    trained = [each for each in (call.A, call.B, call.magnitude, call.lam) if each is not None]
    frozen = [each for each in (call.weight, call.bias) if each is not None]
    if (
        backend != "eager"
        or call.seed is not None
        or dtype not in _DTYPES
        or o.frozen_rank
        or o.save_output
        or not isinstance(call.weight, Tensor)
        or not torch.is_grad_enabled()
        or torch.is_autocast_enabled(call.x.device.type)
        or ops.stages(backend, call[:-1]) is not eager
        or ops_replaced()
    ):
        return False
    for each in trained:
        if each.dtype != dtype or not each.requires_grad:
            return False
    for each in frozen:  # noqa: SIM110, a generator is another frame
        if each.dtype != dtype or each.requires_grad:
            return False
    return True


def _direct_if_plain(call: Call, backend: str) -> Tensor | None:
    return direct(call) if is_plain(call, backend) else None


AdaptedLinear = differentiable("AdaptedLinear", Call, Saved, compute, gradients, direct=_direct_if_plain)
"""y of one `Call`, and every gradient of it."""


class StraightLinear:
    """y of one `Call` that is known to ask for no more than arithmetic; its x may have any number
    of dimensions.
    """

    @staticmethod
    def direct(call: Call, backend: str) -> Tensor:
        """Run it."""
        return direct(call)
