"""DoRA's norm ‖W + scale · B̂Â‖₂ of every row, c = m / norm, and on request c ⊙ W: one launch."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.launch import launch, rows


def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """‖W + scale · B̂Â‖ by rows and c = m / ‖·‖, [N] float32, and c ⊙ W [N, K]; W may lie
    transposed.
    """
    (N, K), R = weight.shape, A_hat.shape[0]
    norm = weight.new_empty(N, dtype=torch.float32)
    c = norm.new_empty(0 if magnitude is None else N)
    out = weight.new_empty((N, K) if scaled else 0)
    column, product = None if magnitude is None else c, out if scaled else None
    weight = weight if weight.stride(0) == 1 else rows(weight)
    launch("row_norm", weight, rows(A_hat), B_hat, magnitude, norm, column, product, N, K, R, scale)
    return norm, c, out
