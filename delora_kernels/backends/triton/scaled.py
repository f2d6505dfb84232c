"""A matrix scaled by rows or by columns, in one launch: DoRA's transient c ⊙ W or dy ⊙ c for a
library GEMM.
"""

import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.launch import launch, record, rows
from delora_kernels.backends.triton.tables import cdiv

BLOCK_ROWS, BLOCK_COLUMNS = 16, 512


@triton.jit(do_not_specialize=["M"])
def scaled_kernel(
    X, FACTOR, OUT, M, C, stride_x, BY_ROW: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr
):  # fmt: skip
    """One tile [BM, BC] of X ⊙ FACTOR, rounded once."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1) * BC + tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    x = tl.load(X + m[:, None] * stride_x + c[None, :], inside, 0.0).to(tl.float32)
    factor = tl.load(FACTOR + m, m < M, 0.0)[:, None] if BY_ROW else tl.load(FACTOR + c, c < C, 0.0)[None, :]
    tl.store(OUT + m[:, None] * C + c[None, :], (x * factor).to(OUT.dtype.element_ty), inside)


def scaled(matrix: Tensor, factor: Tensor, by_row: bool) -> Tensor:
    """matrix [M, C] ⊙ factor, a float32 vector of rows [M] or of columns [C]; laid out as the
    matrix is.
    """
    if matrix.stride(0) == 1 and matrix.stride(1) > 1:
        return scaled(matrix.t(), factor, not by_row).t()
    matrix, (M, C) = rows(matrix), matrix.shape
    out = matrix.new_empty((M, C))
    if M * C:
        made = record(scaled_kernel, (C, matrix.stride(0)), BY_ROW=by_row, BM=BLOCK_ROWS, BC=BLOCK_COLUMNS)
        launch(made, (cdiv(M, BLOCK_ROWS), cdiv(C, BLOCK_COLUMNS)), (matrix, factor, out), (M,))
    return out
