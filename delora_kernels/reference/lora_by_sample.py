"""LoRA in a batch whose samples have adapters of their own.

W'_b = W + s_i B_i A_i,   i the adapter of sample b
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_linear_by_sample(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    adapters: Sequence[int | None],
    scale: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with each sample's own low-rank update.

        y_b = x_b Wᵀ + s_i x_b A_iᵀ B_iᵀ + bias,   i = adapters[b]

    Args:
        x: `[batch, ..., K]`, any float dtype, which all tensors share.
        weight: W, `[N, K]`.
        A: `[r_i, K]` each.
        B: `[N, r_i]` each.
        adapters: For each sample the place of its adapter in A and B; None: it has none.
        scale: s_i, or one for all.
        bias: `[N]` or None.

    Returns:
        y, `[batch, ..., N]`.

    Source: arXiv:2106.09685, equation 3, sample by sample.
    """
    samples = []
    for x_b, i in zip(x, adapters, strict=True):
        y_b = x_b @ weight.T
        if i is not None:
            s = scale[i] if isinstance(scale, Sequence) else scale
            y_b = y_b + s * (x_b.to(A[i].dtype) @ A[i].T) @ B[i].T
        samples.append(y_b if bias is None else y_b + bias)
    return torch.stack(samples)
