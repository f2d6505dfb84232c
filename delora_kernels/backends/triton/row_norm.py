"""DoRA's norm ‖W + scale · B̂Â‖₂ of every row, from one read of W; B̂Â exists a tile at a time."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.device import mixed_dot
from delora_kernels.backends.triton.launch import INTERPRETED, PLAIN, WIDE, guard, precision
from delora_kernels.backends.triton.tables import rank_tile, tiles


@triton.jit
def row_norm_kernel(
    W, A, B, NORM, N, K, R, stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, scale,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BN rows of ‖W + scale · BA‖; strides are free, so that a transposed W (Conv1D) is read as it lies."""
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    squares = tl.zeros((BN,), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK).to(tl.int64)
        acc = tl.zeros((BN, BK), tl.float32)
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            b = tl.load(B + n[:, None] * stride_bn + r[None, :] * stride_br, (n[:, None] < N) & (r[None, :] < R), 0.0)
            a = tl.load(A + r[:, None] * stride_ar + k[None, :] * stride_ak, (r[:, None] < R) & (k[None, :] < K), 0.0)
            acc = mixed_dot(b, a, acc, HOW, PRECISION, INTERPRETED)
        at = W + n[:, None] * stride_wn + k[None, :] * stride_wk
        updated = tl.load(at, (n[:, None] < N) & (k[None, :] < K), 0.0).to(tl.float32) + scale * acc
        squares += tl.sum(updated * updated, 1)
    tl.store(NORM + n, tl.sqrt(squares), n < N)


def row_norm(weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float) -> Tensor:
    """‖W + scale · B̂Â‖ by rows, [N] float32; W [N, K] with any strides."""
    (N, K), R = weight.shape, A_hat.shape[0]
    norm = weight.new_empty(N, dtype=torch.float32)
    BR = rank_tile("row_norm", R)
    tile = tiles("row_norm", BR)
    # c divides by the norm, which multiplies all that follows: with float32 factors it stays float32
    how = PLAIN if B_hat.dtype == A_hat.dtype == weight.dtype else WIDE
    with guard(weight):
        row_norm_kernel[(triton.cdiv(N, tile.tokens),)](
            weight, A_hat, B_hat, norm, N, K, R, *weight.stride(), *A_hat.stride(), *B_hat.stride(), scale,
            HOW=how, PRECISION=precision(weight.dtype, how), INTERPRETED=INTERPRETED,
            BN=tile.tokens, BK=tile.columns, BR=BR, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return norm
