"""DoRA's norm ‖W + scale · B̂Â‖₂ of every row and c = m / norm, from one read of W; B̂Â exists a
tile at a time.

On request c ⊙ W too: its rows are read a second time right after the first, from the cache.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.device import mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    PLAIN,
    WIDE,
    Record,
    in_tf32,
    launch,
    planned,
    precision,
    record,
)
from delora_kernels.backends.triton.tables import cdiv, rank_tile, tiles


@triton.jit
def row_norm_kernel(
    W, A, B, MAGNITUDE, NORM, COLUMN, SCALED, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sn, stride_sk, scale,
    WITH_COLUMN: tl.constexpr, WITH_SCALED: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BN rows of ‖W + scale · BA‖; strides are free, so that a transposed W (Conv1D) is read as it
    lies.
    """
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
    norm = tl.sqrt(squares)
    tl.store(NORM + n, norm, n < N)
    if WITH_COLUMN:
        m = tl.load(MAGNITUDE + n, n < N, 0.0).to(tl.float32)
        column = tl.where(norm == 0.0, 0.0, m / tl.where(norm == 0.0, 1.0, norm))
        tl.store(COLUMN + n, column, n < N)
        if WITH_SCALED:
            for k0 in range(0, K, BK):
                k = k0 + tl.arange(0, BK).to(tl.int64)
                inside = (n[:, None] < N) & (k[None, :] < K)
                w = tl.load(W + n[:, None] * stride_wn + k[None, :] * stride_wk, inside, 0.0).to(tl.float32)
                out = (w * column[:, None]).to(SCALED.dtype.element_ty)
                tl.store(SCALED + n[:, None] * stride_sn + k[None, :] * stride_sk, out, inside)


@planned
def _plan(
    integers: tuple[int, ...], mixed: bool, device: torch.device, tf32: bool, column: bool, scaled: bool
) -> tuple[Record, tuple[int]]:
    """Return the record and the grid of a launch.

    Args:
        integers: As the kernel takes them.
        mixed: Whether the factors are of another dtype than W.
        device: Of W.
        tf32: Of the product.
        column, scaled: Whether c, whether c ⊙ W is wanted.
    """
    N, _, R, *_ = integers
    BR = rank_tile("row_norm", R)
    tile = tiles("row_norm", BR, capability(device))
    # c divides by the norm, which multiplies all that follows: with float32 factors it stays
    # float32
    how = WIDE if mixed else PLAIN
    made = record(
        row_norm_kernel, integers, WITH_COLUMN=column, WITH_SCALED=scaled,
        HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BN=tile.tokens, BK=tile.columns, BR=BR, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made, (cdiv(N, tile.tokens),)


def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """‖W + scale · B̂Â‖ by rows and c = m / ‖·‖, [N] float32, and c ⊙ W [N, K]; W has any
    strides.
    """
    (N, K), R = weight.shape, A_hat.shape[0]
    norm = weight.new_empty(N, dtype=torch.float32)
    column = norm.new_empty(0 if magnitude is None else N)
    out = weight.new_empty((N, K) if scaled else 0)
    strides = (*weight.stride(), *A_hat.stride(), *B_hat.stride(), *(out.stride() if scaled else (0, 0)))
    mixed = not (B_hat.dtype == A_hat.dtype == weight.dtype)
    made, grid = _plan((N, K, R, *strides), mixed, weight.device, in_tf32(weight.dtype), magnitude is not None, scaled)
    launch(made, grid, (weight, A_hat, B_hat, magnitude, norm, column, out), (), (scale,))
    return norm, column, out
