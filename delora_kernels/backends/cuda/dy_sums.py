"""What one read of dy gives at ranks up to 32, and what `expand_backward` makes of its parts."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.launch import DTYPES, launch, library, rows, splits, tiles
from delora_kernels.backends.library_gemm import DyParts

LARGEST_RANK = 32


def takes(dy: Tensor, small: Tensor, h: Tensor, c: Tensor | None = None) -> bool:
    """Whether one read does it: few ranks, small in h's dtype, and something to read."""
    return dy.numel() > 0 and 0 < h.shape[1] <= LARGEST_RANK and small.dtype == h.dtype


def dy_sums(
    dy: Tensor, small: Tensor, h: Tensor, factor: float, sums: bool, y: Tensor | None, c: Tensor | None = None
) -> DyParts:
    """dv = dy (c ⊙ small), factor · dyᵀ h, Σ_t dy and Σ_t dy ⊙ y, in parts.

    Args:
        dy: [T, N].
        small: [N, R], any strides; h's dtype.
        h: [T, R], any strides; dy's dtype or float32.
        factor: Of dyᵀ h.
        sums: Whether Σ_t dy is wanted.
        y: [T, N] in dy's dtype: Σ_t dy ⊙ y is wanted; or None.
        c: [N] float32, or None for 1.
    """
    (T, N), R = dy.shape, h.shape[1]
    chunks = -(-N // library().dk_dy_sums_columns())
    parts = splits(chunks, tiles(T))
    dv = dy.new_empty((chunks, T, R), dtype=torch.float32)
    product = dv.new_empty((parts, N, R))
    summed, dots = (dv.new_empty((parts, N)) if wanted else None for wanted in (sums, y is not None))
    y = None if y is None else rows(y)
    launch("dy_sums", rows(dy), small, c, h, y, dv, product, summed, dots, T, N, R, parts, factor)
    return DyParts(dv, product, summed, dots)


def finish_dy(
    parts: DyParts, dtype: torch.dtype, column: Tensor | None, B_hat: Tensor | None, divisor: Tensor | None
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """dv in `dtype`, dB̂ = c ⊙ product, dm = (dots + Σ_r product ⊙ B̂) / divisor and Σ_t dy, in one launch.

    Args:
        parts: What to add up.
        dtype: Of dv.
        column: c [N] float32, or None for 1.
        B_hat: [N, R] where the dots lack the rank-R term of u, else None.
        divisor: [N]; dm is 0 where it is 0. Needed with dots.
    """
    vectors = next((found for found in parts[1:] if found is not None), None)
    if vectors is None:
        return None, None, None, None
    P, N = vectors.shape[:2]
    R = 0 if parts.product is None else parts.product.shape[2]
    if P == 1 and parts.dv is None and column is None and parts.dots is None:
        return (
            None,
            None if parts.product is None else parts.product[0],
            None,
            None if parts.sums is None else parts.sums[0],
        )
    dv = None if parts.dv is None else parts.dv.new_empty(parts.dv.shape[1:], dtype=dtype)
    dB = None if parts.product is None else vectors.new_empty((N, R))
    dm, dy_sum = (None if found is None else vectors.new_empty(N) for found in (parts.dots, parts.sums))
    dv_parts, dv_size = (0, 0) if dv is None or parts.dv is None else (len(parts.dv), dv.numel())
    launch(
        "finish_dy", parts.dv, dv_parts, dv_size, dv, DTYPES[dtype], *parts[1:], P, B_hat, column, divisor,
        dB, dm, dy_sum, N, R,
    )  # fmt: skip
    return dv, dB, dm, dy_sum
