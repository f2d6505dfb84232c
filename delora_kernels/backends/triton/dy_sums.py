"""All that one read of dy gives at ranks up to 32: dv = dy (c ⊙ S), dyᵀ h, Σ_t dy and Σ_t dy ⊙ Y.

A program owns a chunk of tokens and a chunk of columns. It keeps its part of dyᵀ h in registers
while it walks its tokens, and writes its part of dv for each step; `add_parts.py` adds the parts of
both in a fixed order. At higher ranks the parts of dv would be more than a second read of dy:
`times_small.py` and `token_sums.py` do the two halves there.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.library_gemm import DyParts
from delora_kernels.backends.triton.device import in_units, lane_sums, mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    WIDE,
    Record,
    dot_split,
    in_tf32,
    launch,
    planned,
    precision,
    record,
    rows,
)
from delora_kernels.backends.triton.tables import cdiv, dtypes, lanes, rank_tile, side_by_side, splits, tiles, unit

LARGEST_RANK = 32


@triton.jit(do_not_specialize=["T", "part"])
def dy_sums_kernel(
    DY, S, COLUMN, H, Y, DV, PRODUCT, SUMS, DOTS,
    T, part, N, R, stride_dy, stride_sn, stride_sr, stride_h, stride_y, factor,
    WITH_SUMS: tl.constexpr, WITH_DOTS: tl.constexpr, WITH_COLUMN: tl.constexpr,
    HOW: tl.constexpr, HOW_H: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One chunk's part of dv, a tile [BT, BR] for each step, and its [BC, BR] of factor · dyᵀ h
    over `part` tokens.
    """
    R, stride_h, stride_sn = in_units(R, UNIT), in_units(stride_h, UNIT), in_units(stride_sn, UNIT)
    chunk = tl.program_id(0).to(tl.int64)
    n = chunk * BC + tl.arange(0, BC)
    r = tl.arange(0, BR)
    small = S + n[:, None] * stride_sn + r[None, :] * stride_sr
    s = tl.load(small, (n[:, None] < N) & (r[None, :] < R), 0.0)
    if WITH_COLUMN:
        s = s.to(tl.float32) * tl.load(COLUMN + n, n < N, 0.0)[:, None]
    acc = tl.zeros((BC, BR), tl.float32)
    sums = tl.zeros((LANES, BC), tl.float32)
    dots = tl.zeros((LANES, BC), tl.float32)
    start = tl.program_id(1).to(tl.int64) * part
    for t0 in tl.range(start, tl.minimum(start + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        inside = (t[:, None] < T) & (n[None, :] < N)
        dy = tl.load(DY + t[:, None].to(tl.int64) * stride_dy + n[None, :], inside, 0.0)
        h_at = H + t[:, None].to(tl.int64) * stride_h + r[None, :]
        ranked = (t[:, None] < T) & (r[None, :] < R)
        h = tl.load(h_at, ranked, 0.0)
        if WITH_DOTS:
            y = tl.load(Y + t[:, None].to(tl.int64) * stride_y + n[None, :], inside, 0.0)
            dots += lane_sums(dy.to(tl.float32) * y.to(tl.float32), LANES)
        if WITH_SUMS:
            sums += lane_sums(dy.to(tl.float32), LANES)
        # in this order: the other way round each matrix instruction waits for the one before
        acc = mixed_dot(tl.trans(dy), h, acc, HOW_H, PRECISION, INTERPRETED)
        dv = mixed_dot(dy, s, tl.zeros((BT, BR), tl.float32), HOW, PRECISION, INTERPRETED)
        tl.store(DV + (chunk * T + t[:, None]) * R + r[None, :], dv, ranked)
    column = tl.program_id(1).to(tl.int64) * N + n
    tl.store(PRODUCT + column[:, None] * R + r[None, :], acc * factor, (n[:, None] < N) & (r[None, :] < R))
    if WITH_SUMS:
        tl.store(SUMS + column, tl.sum(sums, 0), n < N)
    if WITH_DOTS:
        tl.store(DOTS + column, tl.sum(dots, 0), n < N)


def wider(big: torch.dtype, small: torch.dtype, h: torch.dtype) -> str:
    """Return which tiles these dtypes take: h wider than dy needs more registers than c ⊙ S
    alone.
    """
    return dtypes(big, h) or ("scaled" if small != big else "")


def takes(dy: Tensor, small: Tensor, h: Tensor, c: Tensor | None = None) -> bool:
    """Whether one read does it: on 16-bit units (float32's tiles would spill), few ranks, and
    something to read.
    """
    how = dot_split(dy.dtype, _dtype(small, c)), dot_split(dy.dtype, h.dtype)
    return dy.dtype.itemsize == 2 and WIDE not in how and h.shape[1] <= LARGEST_RANK and dy.numel() > 0


def _dtype(small: Tensor, c: Tensor | None) -> torch.dtype:
    """Of c ⊙ small, which is not rounded."""
    return small.dtype if c is None else torch.float32


@planned
def _plan(
    T: int, integers: tuple[int, ...], kinds: tuple[torch.dtype, torch.dtype, torch.dtype], device: torch.device,
    sums: bool, dots: bool, column: bool, tf32: bool,
) -> tuple[Record, int, int, int]:  # fmt: skip
    """Return the record of a launch, its chunks and parts, and the tokens of a part.

    Args:
        T: Tokens.
        integers: As the kernel takes them, from N on.
        kinds: The dtypes of dy, of c ⊙ small, of h.
        device: Theirs.
        sums, dots, column: Whether the launch has them.
        tf32: Of dy's products.
    """
    (N, R, _, stride_sn, _, stride_h, _), (big, small, h) = integers, kinds
    BR = rank_tile("dy_sums", R)
    tile = tiles("dy_sums", BR, capability(device), wider(big, small, h))
    chunks, steps = cdiv(N, tile.columns), cdiv(T, tile.tokens)
    # one that has twice of what a multiprocessor needs in flight leaves no room for another
    in_flight = (tile.stages - 1) * tile.tokens * tile.columns * big.itemsize // 2
    part = cdiv(steps, splits(chunks, steps, side_by_side(device, in_flight))) * tile.tokens
    how, how_h = dot_split(big, small), dot_split(big, h)
    made = record(
        dy_sums_kernel, integers, WITH_SUMS=sums, WITH_DOTS=dots, WITH_COLUMN=column,
        HOW=how, HOW_H=how_h, PRECISION=precision(max(how, how_h), tf32), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, LANES=lanes(tile, big),
        STAGES=tile.stages, UNIT=unit(R, stride_sn, stride_h), num_warps=tile.warps,
    )  # fmt: skip
    return made, chunks, cdiv(T, part), part


def dy_sums(
    dy: Tensor, small: Tensor, h: Tensor, factor: float, sums: bool, y: Tensor | None, c: Tensor | None = None
) -> DyParts:
    """dv = dy (c ⊙ small), factor · dyᵀ h, Σ_t dy and Σ_t dy ⊙ y, in parts.

    Args:
        dy: [T, N].
        small: S, [N, R], any strides.
        h: [T, R].
        factor: Of dyᵀ h.
        sums: Whether Σ_t dy is wanted.
        y: [T, N]: Σ_t dy ⊙ y is wanted; or None.
        c: [N] float32, or None for 1.
    """
    (T, N), R = dy.shape, h.shape[1]
    dy, h, y = rows(dy), rows(h), None if y is None else rows(y)
    integers = (N, R, dy.stride(0), *small.stride(), h.stride(0), 0 if y is None else y.stride(0))
    kinds = (dy.dtype, _dtype(small, c), h.dtype)
    made, chunks, parts, part = _plan(
        T, integers, kinds, dy.device, sums, y is not None, c is not None, in_tf32(dy.dtype)
    )
    dv = dy.new_empty((chunks, T, R), dtype=torch.float32)
    product = dv.new_empty((parts, N, R))
    summed = dv.new_empty((parts, N)) if sums else None
    dots = None if y is None else dv.new_empty((parts, N))
    launch(made, (chunks, parts), (dy, small, c, h, y, dv, product, summed, dots), (T, part), (factor,))
    return DyParts(dv, product, summed, dots)
