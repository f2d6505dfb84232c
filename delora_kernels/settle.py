"""What every call settles alike: transforms are refused, dtypes chosen, tokens laid out as rows."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def dtypes(x: Tensor, *factors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """compute_dtype and rank_dtype of a call: autocast's, or x's and the widest of x's and the factors'."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        return dtype, dtype
    rank_dtype = x.dtype
    for factor in factors:
        if factor.dtype != rank_dtype:
            rank_dtype = torch.promote_types(rank_dtype, factor.dtype)
    return x.dtype, rank_dtype


def as_rows(x: Tensor) -> Tensor:
    """x `[..., K]` as `[T, K]`."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def active_transform(tensors: Iterable[Any]) -> str | None:
    """The functional transform that is under way, which the autograd Function can't take part in, or None."""
    if torch.compiler.is_compiling():
        return None
    if torch._C._are_functorch_transforms_active():
        return "torch.func transforms"
    if forward_ad._current_level >= 0:
        duals = (forward_ad.unpack_dual(t) for t in tensors if isinstance(t, Tensor) and t.is_floating_point())
        if any(dual.tangent is not None for dual in duals):
            return "forward-mode differentiation"
    return None


def refuse_transforms(name: str, tensors: Iterable[Any], instead: str) -> None:
    """Raise where a functional transform is under way that `name` can't take part in."""
    transform = active_transform(tensors)
    if transform is not None:
        raise RuntimeError(f"{name} does not support {transform}; use delora_kernels.{instead} there")
