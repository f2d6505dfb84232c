"""DoRA's norm ‖W + scale · B̂Â‖₂ of every row and c = m / norm, from one read of W; B̂Â exists a
tile at a time. Of several experts' matrices by one launch, each its own.

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
from delora_kernels.backends.triton.tables import Tiles, cdiv, dtypes, multiprocessors, rank_tile, tiles


@triton.jit
def _add_term(
    acc, A, B, r, n, k, N, K, R, stride_ar, stride_ak, stride_bn, stride_br,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
):  # fmt: skip
    """acc + B A of the ranks r."""
    b = tl.load(B + n[:, None] * stride_bn + r[None, :] * stride_br, (n[:, None] < N) & (r[None, :] < R), 0.0)
    a = tl.load(A + r[:, None] * stride_ar + k[None, :] * stride_ak, (r[:, None] < R) & (k[None, :] < K), 0.0)
    return mixed_dot(b, a, acc, HOW, PRECISION, INTERPRETED)


@triton.jit
def row_norm_kernel(
    W, A, B, MAGNITUDE, NORM, COLUMN, SCALED, N, K, R,
    stride_wn, stride_wk, stride_ar, stride_ak, stride_bn, stride_br, stride_sn, stride_sk,
    stride_we, stride_ae, stride_be, scale,
    WITH_COLUMN: tl.constexpr, WITH_SCALED: tl.constexpr, EXPERTS: tl.constexpr, ONE_TURN: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BN: tl.constexpr, BK: tl.constexpr, BR: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """BN rows of ‖W + scale · BA‖; strides are free, so that a transposed W (Conv1D) is read as it
    lies. A loop over ranks within the loop over K keeps W from being loaded ahead: ONE_TURN has
    none.
    """
    if EXPERTS:
        e = tl.program_id(1).to(tl.int64)
        W, A, B = W + e * stride_we, A + e * stride_ae, B + e * stride_be
        NORM += e * N
        if WITH_COLUMN:
            COLUMN, MAGNITUDE = COLUMN + e * N, MAGNITUDE + e * N
    n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    r = tl.arange(0, BR)
    squares = tl.zeros((BN, BK), tl.float32)
    for k0 in tl.range(0, K, BK, num_stages=STAGES):
        k = k0 + tl.arange(0, BK).to(tl.int64)
        acc = tl.zeros((BN, BK), tl.float32)
        if ONE_TURN:
            acc = _add_term(
                acc, A, B, r, n, k, N, K, R, stride_ar, stride_ak, stride_bn, stride_br, HOW, PRECISION, INTERPRETED
            )
        else:
            for r0 in range(0, R, BR):
                acc = _add_term(
                    acc, A, B, r0 + r, n, k, N, K, R, stride_ar, stride_ak, stride_bn, stride_br,
                    HOW, PRECISION, INTERPRETED,
                )  # fmt: skip
        at = W + n[:, None] * stride_wn + k[None, :] * stride_wk
        updated = tl.load(at, (n[:, None] < N) & (k[None, :] < K), 0.0).to(tl.float32) + scale * acc
        squares += updated * updated
    norm = tl.sqrt(tl.sum(squares, 1))
    tl.store(NORM + n, norm, n < N)
    if WITH_COLUMN:
        m = tl.load(MAGNITUDE + n, n < N, 0.0).to(tl.float32)
        column = tl.where(norm == 0.0, 0.0, m / tl.where(norm == 0.0, 1.0, norm))
        tl.store(COLUMN + n, column, n < N)
        if WITH_SCALED:
            for k0 in tl.range(0, K, BK, num_stages=STAGES):
                k = k0 + tl.arange(0, BK).to(tl.int64)
                inside = (n[:, None] < N) & (k[None, :] < K)
                w = tl.load(W + n[:, None] * stride_wn + k[None, :] * stride_wk, inside, 0.0).to(tl.float32)
                out = (w * column[:, None]).to(SCALED.dtype.element_ty)
                tl.store(SCALED + n[:, None] * stride_sn + k[None, :] * stride_sk, out, inside)


def shape(tile: Tiles, BR: int, N: int, programs: int) -> tuple[int, int]:
    """Return rows and columns of a program's tile: lower and wider ones where N rows make fewer
    than `programs` of them, but none with fewer rows of W than of Â, which each program reads too.
    """
    BN, BK = tile.tokens, tile.columns
    while cdiv(N, BN) < programs and BN // 2 >= BR:
        BN, BK = BN // 2, BK * 2
    return BN, BK


@planned
def _plan(
    integers: tuple[int, ...], E: int, kinds: str, device: torch.device, tf32: bool, column: bool, scaled: bool
) -> tuple[Record, tuple[int, int]]:
    """Return the record and the grid of a launch.

    Args:
        integers: As the kernel takes them.
        E: Experts; 0: a single W.
        kinds: What `dtypes` says of W and the factors.
        device: Of W.
        tf32: Of the product.
        column, scaled: Whether c, whether c ⊙ W is wanted.
    """
    N, _, R, *_ = integers
    BR = rank_tile("row_norm" if kinds == "" else "row_norm mixed", R)
    tile = tiles("row_norm", BR, capability(device), kinds)
    BN, BK = shape(tile, BR, N * max(1, E), multiprocessors(device))
    # c divides by the norm, which multiplies all that follows: with float32 factors it stays
    # float32
    how = WIDE if kinds == "mixed" else PLAIN
    made = record(
        row_norm_kernel, integers, WITH_COLUMN=column, WITH_SCALED=scaled, EXPERTS=E > 0, ONE_TURN=R <= BR,
        HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BN=BN, BK=BK, BR=BR, STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return made, (cdiv(N, BN), max(1, E))


def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """‖W + scale · B̂Â‖ by rows and c = m / ‖·‖, [N] float32, and c ⊙ W [N, K]; W has any strides.
    Of experts, [E, N].
    """
    (*E, N, K), R = weight.shape, A_hat.shape[-2]
    magnitude = None if magnitude is None else magnitude.contiguous()
    norm = weight.new_empty((*E, N), dtype=torch.float32)
    column = norm.new_empty(0 if magnitude is None else norm.shape)
    out = weight.new_empty((N, K) if scaled else 0)
    if norm.numel() == 0:
        return norm, column, out
    each = [(0,) * (3 - M.dim()) + M.stride() for M in (weight, A_hat, B_hat)]
    strides = [stride for _, *own in each for stride in own] + list(out.stride() if scaled else (0, 0))
    strides += [stride for stride, *_ in each]
    kinds = "mixed" if not (B_hat.dtype == A_hat.dtype == weight.dtype) else dtypes(weight.dtype)
    has = magnitude is not None, scaled
    made, grid = _plan((N, K, R, *strides), E[0] if E else 0, kinds, weight.device, in_tf32(weight.dtype), *has)
    launch(made, grid, (weight, A_hat, B_hat, magnitude, norm, column, out), (), (scale,))
    return norm, column, out
