"""A token-sized matrix times a small one, [T, C] · [C, R]: project's h = drop(x) Âᵀ, and dv = dy (c
⊙ B̂).

One read of the token-sized matrix for each 128 ranks. Where there are few tokens, the sum over C is
split among programs, and the parts are added in a fixed order. Float32 factors beside a bfloat16
matrix come as planes where that pays (`planes.py`).
"""

import math
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup, mask_arguments
from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.backends.triton.device import dropped, in_units, keep_tile, mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    SPLIT_SMALL,
    Record,
    dot_split,
    in_tf32,
    launch,
    planned,
    precision,
    record,
    rows,
)
from delora_kernels.backends.triton.planes import planes
from delora_kernels.backends.triton.tables import cdiv, dtypes, rank_tile, side_by_side, splits, tiles, unit

FEWEST_RANKS = 32
"""Ranks above which float32 factors come as planes: fewer are split as fast as x is read."""


@triton.jit(do_not_specialize=["T"])
def times_small_kernel(
    X, S, OUT, SEED, T, C, R, stride_x, stride_sc, stride_sr, stride_out, stride_plane, part, threshold, factor,
    DROP: tl.constexpr, PLANES: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, UNIT: tl.constexpr, UNIT_S: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BR] of factor · drop(X) S, summed over this program's `part` of C; S is the sum
    of its PLANES, [PLANES, C, R].
    """
    R, stride_out, stride_sc = in_units(R, UNIT), in_units(stride_out, UNIT), in_units(stride_sc, UNIT_S)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    TURNED: tl.constexpr = DROP and HOW == 0 and X.dtype.element_ty != tl.float32 and BR > 16
    acc = tl.zeros((BR, BT) if TURNED else (BT, BR), tl.float32)
    start = tl.program_id(2) * part
    for c0 in range(start, tl.minimum(start + part, C), BC):
        c = c0 + tl.arange(0, BC)
        x = tl.load(X + t[:, None] * stride_x + c[None, :], (t[:, None] < T) & (c[None, :] < C), 0.0)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        small = S + c[:, None].to(tl.int64) * stride_sc + r[None, :] * stride_sr
        for p in tl.static_range(PLANES):  # the smallest first
            at = small + (PLANES - 1 - p) * tl.cast(stride_plane, tl.int64)
            s = tl.load(at, (c[:, None] < C) & (r[None, :] < R), 0.0)
            if TURNED:  # a masked x comes from registers: as the left operand, instructions wait one by one
                acc = mixed_dot(tl.trans(s), tl.trans(x), acc, HOW, PRECISION, INTERPRETED)
            else:
                acc = mixed_dot(x, s, acc, HOW, PRECISION, INTERPRETED)
    if TURNED:
        acc = tl.trans(acc)
    out = OUT + (tl.program_id(2).to(tl.int64) * T + t[:, None]) * stride_out + r[None, :]
    tl.store(out, (acc * factor).to(OUT.dtype.element_ty), (t[:, None] < T) & (r[None, :] < R))


def times_small(
    x: Tensor, small: Tensor, dtype: torch.dtype, group: MaskGroup | None = None, column: Tensor | None = None
) -> Tensor:
    """x (column ⊙ small) → [T, R] in `dtype`: `Stages.times_small`."""
    if column is not None:
        if _in_planes(x, column.dtype, small.shape[1]):
            return add_parts(times_planes(x, planes(small, dtype, column), dtype), dtype)
        small = small * column[:, None]
    groups = None if group is None else [group._replace(columns=slice(0, small.shape[1]))]
    return add_parts(times_small_parts(x, small, dtype, groups), dtype)


def _in_planes(x: Tensor, small: torch.dtype, R: int) -> bool:
    """Whether a factor of R ranks in this dtype is made into planes for x."""
    return R > FEWEST_RANKS and dot_split(x.dtype, small) == SPLIT_SMALL and x.numel() > 0


def kinds_of(big: torch.dtype, small: torch.dtype, drop: bool) -> str:
    """Return which tiles a launch takes: a mask needs registers as wider factors do."""
    return dtypes(big, small) or ("dropped" if drop else "")


@planned
def split(
    T: int, C: int, device: torch.device, big: torch.dtype, kinds: tuple[str, ...], *ranks: int
) -> tuple[int, int]:
    """Into how many parts the sum over C of x [T, C] times blocks of these ranks is split, and the
    columns of each: whole tiles of every block's launch, or one would read into the next part.

    Args:
        T, C: Of x.
        device, big: Its device and dtype.
        kinds: What `kinds_of` says of each block.
        ranks: Of the blocks.
    """
    widths = [rank_tile("times_small", R) for R in ranks]
    used = [tiles("times_small", BR, capability(device), kind) for BR, kind in zip(widths, kinds, strict=True)]
    columns = math.lcm(*(tile.columns for tile in used))
    in_flight = min((tile.stages - 1) * tile.tokens * tile.columns for tile in used) * big.itemsize
    programs = sum(cdiv(T, tile.tokens) * cdiv(R, BR) for R, BR, tile in zip(ranks, widths, used, strict=True))
    steps = cdiv(C, columns)
    part = cdiv(steps, splits(programs, steps, side_by_side(device, in_flight))) * columns
    return cdiv(C, part), part


@planned
def _plan(
    T: int, integers: tuple[int, ...], parts: int, big: torch.dtype, small: torch.dtype, device: torch.device,
    drop: bool, tf32: bool, count: int = 1,
) -> tuple[Record, tuple[int, int, int]]:  # fmt: skip
    """Return the record and the grid of a launch; `integers` as the kernel takes them from C on,
    `count` planes.
    """
    (_, R, _, stride_sc, _, stride_out, *_), how = integers, dot_split(big, small)
    BR = rank_tile("times_small", R)
    tile = tiles("times_small", BR, capability(device), kinds_of(big, small, drop) if count == 1 else "planes")
    made = record(
        times_small_kernel, integers,
        DROP=drop, PLANES=count, HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR,
        UNIT=unit(R, stride_out), UNIT_S=unit(R, stride_sc), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made, (cdiv(T, tile.tokens), cdiv(R, BR), parts)


def times_small_parts(
    x: Tensor, small: Tensor, dtype: torch.dtype, groups: Sequence[MaskGroup] | None = None
) -> Tensor:
    """Return the parts of x small: `Stages.times_small_parts`; a launch and a read of x for each
    mask.
    """
    (T, C), R = x.shape, small.shape[1]
    if T * R * C == 0:
        return x.new_zeros((1, T, R), dtype=dtype)
    if (groups is None or (len(groups) == 1 and groups[0].seed is None)) and _in_planes(x, small.dtype, R):
        return times_planes(x, planes(small, dtype), dtype)
    x, device, kinds = rows(x), x.device, (x.dtype, small.dtype)
    if groups is None or len(groups) == 1:
        blocks = [(small, groups[0] if groups else None, R)]
    else:
        blocks = [(small[:, group.columns], group, group.columns.stop - group.columns.start) for group in groups]
    each = tuple(kinds_of(*kinds, group is not None and group.seed is not None) for _, group, _ in blocks)
    parts, part = split(T, C, device, x.dtype, each, *(width for _, _, width in blocks))
    out = x.new_empty((parts, T, R), dtype=dtype if parts == 1 else torch.float32)
    for block, group, width in blocks:
        seed, limit, inverse = mask_arguments(group)
        integers = (C, width, x.stride(0), *block.stride(), R, 0, part, limit)
        made, grid = _plan(T, integers, parts, *kinds, device, seed is not None, in_tf32(x.dtype))
        into = out if group is None or width == R else out[:, :, group.columns]
        launch(made, grid, (x, block, into, seed), (T,), (inverse,))
    return out


def times_planes(x: Tensor, small: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the parts of x [T, C] times a factor in planes, [2 or 3, C, R]."""
    x, (T, C), (count, _, R) = rows(x), x.shape, small.shape
    parts, part = split(T, C, x.device, x.dtype, ("planes",), R)
    out = x.new_empty((parts, T, R), dtype=dtype if parts == 1 else torch.float32)
    integers = (C, R, x.stride(0), *small.stride()[1:], R, small.stride(0), part, 0)
    made, grid = _plan(T, integers, parts, x.dtype, small.dtype, x.device, False, False, count)
    launch(made, grid, (x, small, out, None), (T,), (1.0,))
    return out
