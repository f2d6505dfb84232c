"""LoRA: a frozen linear plus a trainable product of two thin matrices.

    W' = W + s · B A

Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), equation 3; s =
alpha / r there (section 4.1). rsLoRA is the same map with s = alpha / √r: Kalajdzievski
(arXiv:2312.03732).
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with a low-rank update.

        y = x Wᵀ + s · Σⱼ (x ⊙ maskⱼ) Aⱼᵀ Bⱼᵀ + bias

    Args:
        x: `[..., K]`, any float dtype, which all tensors share.
        weight: W, `[N, K]`, nn.Linear's layout.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: s: alpha / r for LoRA, alpha / √r for rsLoRA.
        bias: `[N]` or None.
        ranks: Ranks of the adapters stacked in A's rows and B's columns, each with its own mask;
            None: one adapter.
        dropout_mask: `[T, K]`, with `ranks` one for each adapter `[len(ranks), T, K]`; entries 0 or
            1 / (1 − p), on the input of the low-rank branch; None: no dropout.

    Returns:
        y, `[..., N]`.

    Source: arXiv:2106.09685, equation 3.
    """
    y = x @ weight.T
    widths = [A.shape[0]] if ranks is None else list(ranks)
    masks = [None] * len(widths) if dropout_mask is None else dropout_mask.reshape(len(widths), *x.shape)
    for A_j, B_j, mask in zip(A.split(widths), B.split(widths, dim=1), masks, strict=True):
        dropped = x if mask is None else x * mask
        y = y + scale * (dropped.to(A_j.dtype) @ A_j.T) @ B_j.T
    return y if bias is None else y + bias


def lora_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return the matrix `lora_linear` applies when nothing is dropped.

        W'[n, k] = W[n, k] + s · Σᵢ B[n, i] A[i, k]

    Args:
        weight, A, B, scale: as in `lora_linear`.

    Returns:
        W', `[N, K]`.

    Source: arXiv:2106.09685, equation 3.
    """
    return weight + scale * torch.einsum("ni,ik->nk", B, A)
