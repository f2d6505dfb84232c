"""What eager PyTorch computes for a method in the dtypes a user has: the yardstick of every tolerance.

Where all tensors share a dtype this is the reference in that dtype. With wider adapters on a narrower base it is what
PEFT's layers do: the frozen GEMM in the base's dtype, the branch on a wide copy of x in the adapters' dtype, and one
rounding of their sum. Roundings that PEFT adds to these (DeLoRA's branch before the sum, DoRA's bias taken off the base
and put back) are left out: the yardstick is not made longer by them.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels import reference


def eager(function: str, **arguments: Any) -> Any:
    """The method in plain torch, differentiable by autograd.

    Args:
        function: Name of the function in `delora_kernels.reference`.
        **arguments: Its arguments; x, weight and bias may be narrower than the rest.

    Returns:
        y, `[..., N]`, in x's dtype; of a mixture with its statistics.
    """
    if arguments["x"].dtype == arguments["A"].dtype:
        return getattr(reference, function)(**arguments)
    if function == "dora_linear":
        return _mixed_dora(**arguments)
    return _mixed_additive(function, **arguments)


def _mixed_additive(function: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, **branch: Any) -> Any:
    """x Wᵀ + bias in the base's dtype + the branch, which is the reference with W = 0, in the adapters'."""
    wide = branch["A"].dtype
    added = getattr(reference, function)(x.to(wide), torch.zeros_like(weight, dtype=wide), **branch)
    if isinstance(added, Tensor):
        return (linear(x, weight, bias) + added).to(x.dtype)
    update, stats = added
    return (linear(x, weight, bias) + update).to(x.dtype), stats


def _mixed_dora(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    dropout: str = "peft",
) -> Tensor:
    """base + (c − 1) ⊙ base + c ⊙ branch + bias; PEFT's dropout: the second base sees the dropped x, in A's dtype."""
    wide = A.dtype
    c = magnitude / (weight.to(wide) + scale * B @ A).norm(dim=1).detach()
    base = rescaled = linear(x, weight)
    dropped = x.to(wide)
    if dropout_mask is not None:
        dropped = dropped * dropout_mask
        if dropout == "peft":
            rescaled = linear(dropped, weight.to(wide))
    y = base + (c - 1) * rescaled + c * (scale * (dropped @ A.T) @ B.T)
    return (y if bias is None else y + bias).to(x.dtype)
