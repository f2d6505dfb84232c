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
    parts: DyParts, out: DyParts, column: Tensor | None, B_hat: Tensor | None, divisor: Tensor | None
) -> None:
    """Write to `out` what `Stages.finished` promises, in one launch."""
    count, N = next((found.shape[:2] for found in parts[1:] if found is not None), (0, 0))
    R = 0 if parts.product is None else parts.product.shape[2]
    dv_parts, dv_size, dv_dtype = 0, 0, torch.float32
    if parts.dv is not None and out.dv is not None:
        dv_parts, dv_size, dv_dtype = len(parts.dv), out.dv.numel(), out.dv.dtype
    launch(
        "finish_dy", parts.dv, dv_parts, dv_size, out.dv, DTYPES[dv_dtype], *parts[1:], count, B_hat, column, divisor,
        out.product, out.dots, out.sums, N, R,
    )  # fmt: skip
