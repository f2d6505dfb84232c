"""A float32 factor as bfloat16 tensors that add up to it, made once a call: its planes.

Beside a bfloat16 x a dot takes float32 factors in parts (`mixed_dot`). Where many programs read the
same factor, each of them making the parts anew takes longer than reading x does; planes are read 16
bytes at a time, ahead, straight into the matrix instructions. Three planes hold all of float32's 24
bits, two 16 of them: enough for a result that is rounded to bfloat16's 8.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.device import in_planes
from delora_kernels.backends.triton.launch import launch, record
from delora_kernels.backends.triton.tables import cdiv

BLOCK_ROWS, BLOCK_COLUMNS = 16, 128


@triton.jit
def planes_kernel(
    S, FACTOR, OUT, M, C, stride_m, stride_c, stride_plane,
    WITH_FACTOR: tl.constexpr, BY_ROW: tl.constexpr, PLANES: tl.constexpr, BM: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """One tile [BM, BC] of every plane of S, or of S ⊙ FACTOR, [PLANES, M, C]."""
    m = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    c = tl.program_id(1).to(tl.int64) * BC + tl.arange(0, BC)
    inside = (m[:, None] < M) & (c[None, :] < C)
    s = tl.load(S + m[:, None] * stride_m + c[None, :] * stride_c, inside, 0.0).to(tl.float32)
    if WITH_FACTOR:
        factor = tl.load(FACTOR + m, m < M, 0.0)[:, None] if BY_ROW else tl.load(FACTOR + c, c < C, 0.0)[None, :]
        s *= factor
    high, low, rest = in_planes(s)
    at = OUT + m[:, None] * C + c[None, :]
    tl.store(at, high, inside)
    tl.store(at + stride_plane, low, inside)
    if PLANES == 3:
        tl.store(at + 2 * tl.cast(stride_plane, tl.int64), rest, inside)


def planes(small: Tensor, result: torch.dtype, factor: Tensor | None = None) -> Tensor:
    """small [C, R], or factor ⊙ small, as bfloat16 planes [2 or 3, C, R]; each laid out as small
    is.

    Args:
        small: Any strides.
        result: The dtype of the product that they are for.
        factor: [C] float32.
    """
    transposed = small.stride(0) == 1 and small.stride(1) > 1
    matrix = small.t() if transposed else small
    (M, C), count = matrix.shape, 2 if result == torch.bfloat16 else 3
    out = small.new_empty((count, M, C), dtype=torch.bfloat16)
    if M * C:
        made = record(
            planes_kernel, (M, C, *matrix.stride(), M * C),
            WITH_FACTOR=factor is not None, BY_ROW=not transposed, PLANES=count, BM=BLOCK_ROWS, BC=BLOCK_COLUMNS,
        )  # fmt: skip
        launch(made, (cdiv(M, BLOCK_ROWS), cdiv(C, BLOCK_COLUMNS)), (matrix, factor, out))
    return out.mT if transposed else out
