"""DoRA's norm for layers that rescale an output by torch's own operations."""

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.checks import active_transform
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.functional.common import exporting


def constant_row_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Compute DoRA's ‖W + scale · BA‖ by rows, without a gradient and (but in a program that is
    exported, and under transforms) without BA; ∞ where it is 0, for there is no direction to scale.

    Args:
        weight: W, `[N, ...]`: a row is all but the first dimension.
        A: `[r, ...]` likewise.
        B: `[N, r]`, or with more dimensions of size 1.
        scale: Factor of the update.

    Returns:
        `[N]`, in float32 or wider.
    """
    acc = accumulate_dtype(weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        rows, A, B = weight.flatten(1), A.flatten(1).to(acc), B.flatten(1).to(acc)
        norm: Tensor
        if exporting() or active_transform((weight, A, B)) is not None:
            norm = torch.linalg.vector_norm(torch.addmm(rows.to(acc), B, A, alpha=scale), dim=1)
        else:
            norm = ops.stages("eager", (rows, A, B)).row_norm(rows, A, B, scale, None, False)[0]
        return norm.masked_fill(norm == 0, torch.inf).detach()  # a constant of forward mode too
