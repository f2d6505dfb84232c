"""Sums over tokens: Xᵀ H [C, R], and beside it Σ_t X and Σ_t X ⊙ Y [C], from one read of X for each 128 ranks.

That is dÂ = dvᵀ drop(x) and dB̂ = dyᵀ h, with the bias's gradient and DoRA's Σ_t dy ⊙ u. Tokens are split among
programs; their parts are added in a fixed order, so that gradients repeat bit for bit.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.eager.hashed_dropout import MaskGroup, threshold
from delora_kernels.backends.triton.device import dropped, keep_tile, mixed_dot
from delora_kernels.backends.triton.launch import INTERPRETED, guard, meeting, precision, rows
from delora_kernels.backends.triton.tables import rank_tile, splits, tiles


@triton.jit
def token_sums_kernel(
    X, H, Y, SEED, PRODUCT, SUMS, DOTS, T, C, R, stride_x, stride_h, stride_y, part, threshold, factor,
    DROP: tl.constexpr, WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, WITH_DOTS: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile [BC, BR] of factor · drop(X)ᵀ H and BC of each vector, summed over `part` tokens."""
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros((BC, BR), tl.float32)
    sums = tl.zeros((BC,), tl.float32)
    dots = tl.zeros((BC,), tl.float32)
    start = tl.program_id(2).to(tl.int64) * part
    for t0 in range(start, tl.minimum(start + part, T), BT):
        t = t0 + tl.arange(0, BT)
        inside = (t[:, None] < T) & (c[None, :] < C)
        x = tl.load(X + t[:, None].to(tl.int64) * stride_x + c[None, :], inside, 0.0)
        if WITH_SUMS:
            sums += tl.sum(x.to(tl.float32), 0)
        if WITH_DOTS:
            y = tl.load(Y + t[:, None].to(tl.int64) * stride_y + c[None, :], inside, 0.0)
            dots += tl.sum(x.to(tl.float32) * y.to(tl.float32), 0)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        if WITH_PRODUCT:
            h_at = H + t[:, None].to(tl.int64) * stride_h + r[None, :]
            h = tl.load(h_at, (t[:, None] < T) & (r[None, :] < R), 0.0)
            acc = mixed_dot(tl.trans(x), h, acc, HOW, PRECISION, INTERPRETED)
    column = tl.program_id(2).to(tl.int64) * C + c
    if WITH_PRODUCT:
        tl.store(PRODUCT + column[:, None] * R + r[None, :], acc * factor, (c[:, None] < C) & (r[None, :] < R))
    if tl.program_id(1) == 0:
        if WITH_SUMS:
            tl.store(SUMS + column, sums, c < C)
        if WITH_DOTS:
            tl.store(DOTS + column, dots, c < C)


class Sums(NamedTuple):
    """factor · Xᵀ H [C, R], Σ_t X [C] and Σ_t X ⊙ Y [C], in float32; None where not asked for."""

    product: Tensor | None
    sums: Tensor | None
    dots: Tensor | None


def token_sums(
    x: Tensor, h: Tensor | None, factor: float = 1.0, *, sums: bool = False, y: Tensor | None = None,
    group: MaskGroup | None = None,
) -> Sums:  # fmt: skip
    """What one pass over x [T, C] sums up over tokens.

    Args:
        x: [T, C].
        h: [T, R], or None: no product.
        factor: Of the product.
        sums: Whether Σ_t x is wanted.
        y: [T, C]: Σ_t x ⊙ y is wanted; or None.
        group: Mask of the product's x, or None.
    """
    (T, C), R = x.shape, 0 if h is None else h.shape[1]
    if T * C == 0:
        zeros = x.new_zeros(C, dtype=torch.float32)
        product = None if h is None else x.new_zeros((C, R), dtype=torch.float32)
        return Sums(product, zeros if sums else None, None if y is None else zeros.clone())
    x, h, y = rows(x), None if h is None else rows(h), None if y is None else rows(y)
    BR = rank_tile("token_sums", R)
    tile = tiles("token_sums", BR)
    grid = (triton.cdiv(C, tile.columns), max(1, triton.cdiv(R, BR)))
    steps = triton.cdiv(T, tile.tokens)
    part = triton.cdiv(steps, splits(grid[0] * grid[1], steps)) * tile.tokens
    parts = triton.cdiv(T, part)
    product = x.new_empty((parts, C, R), dtype=torch.float32)
    totals = x.new_empty((2, parts, C), dtype=torch.float32)
    seed, p = (None, 0.0) if group is None else (group.seed, group.dropout_p)
    how = meeting(x.dtype, x.dtype if h is None else h.dtype)
    with guard(x):
        token_sums_kernel[(grid[0], grid[1], parts)](
            x, h, y, seed, product, totals[0], totals[1], T, C, R,
            x.stride(0), 0 if h is None else h.stride(0), 0 if y is None else y.stride(0), part,
            threshold(p), factor / (1 - p),
            DROP=seed is not None, WITH_PRODUCT=h is not None, WITH_SUMS=sums, WITH_DOTS=y is not None,
            HOW=how, PRECISION=precision(x.dtype, how), INTERPRETED=INTERPRETED,
            BT=tile.tokens, BC=tile.columns, BR=BR, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return Sums(
        None if h is None else product.sum(0) if parts > 1 else product[0],
        totals[0].sum(0) if sums else None,
        None if y is None else totals[1].sum(0),
    )
