"""A token-sized matrix times a small one, [T, C] · [C, R]: project's h = drop(x) Âᵀ, and dv = dy (c
⊙ B̂).

One read of the token-sized matrix for each 128 ranks. Where there are few tokens, the sum over C is
split among programs, and the parts are added in a fixed order.
"""

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
    Record,
    dot_split,
    in_tf32,
    launch,
    planned,
    precision,
    record,
    rows,
)
from delora_kernels.backends.triton.tables import cdiv, dtypes, rank_tile, side_by_side, splits, tiles, unit


@triton.jit(do_not_specialize=["T"])
def times_small_kernel(
    X, S, OUT, SEED, T, C, R, stride_x, stride_sc, stride_sr, stride_out, part, threshold, factor,
    DROP: tl.constexpr, HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, UNIT: tl.constexpr, UNIT_S: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BR] of factor · drop(X) S, summed over this program's `part` of C."""
    R, stride_out, stride_sc = in_units(R, UNIT), in_units(stride_out, UNIT), in_units(stride_sc, UNIT_S)
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    start = tl.program_id(2) * part
    for c0 in range(start, tl.minimum(start + part, C), BC):
        c = c0 + tl.arange(0, BC)
        x = tl.load(X + t[:, None] * stride_x + c[None, :], (t[:, None] < T) & (c[None, :] < C), 0.0)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        small = S + c[:, None].to(tl.int64) * stride_sc + r[None, :] * stride_sr
        s = tl.load(small, (c[:, None] < C) & (r[None, :] < R), 0.0)
        acc = mixed_dot(x, s, acc, HOW, PRECISION, INTERPRETED)
    out = OUT + (tl.program_id(2).to(tl.int64) * T + t[:, None]) * stride_out + r[None, :]
    tl.store(out, (acc * factor).to(OUT.dtype.element_ty), (t[:, None] < T) & (r[None, :] < R))


def times_small(x: Tensor, small: Tensor, dtype: torch.dtype, group: MaskGroup | None = None) -> Tensor:
    """x small → [T, R] in `dtype`: `Stages.times_small`."""
    groups = None if group is None else [group._replace(columns=slice(0, small.shape[1]))]
    return add_parts(times_small_parts(x, small, dtype, groups), dtype)


def kinds_of(big: torch.dtype, small: torch.dtype, drop: bool) -> str:
    """Return which tiles a launch takes: a mask needs registers as wider factors do."""
    return dtypes(big, small) or ("mixed" if drop else "")


@planned
def split(T: int, C: int, device: torch.device, big: torch.dtype, kinds: str, *ranks: int) -> tuple[int, int]:
    """Into how many parts the sum over C of x [T, C] times blocks of these ranks is split, and the
    columns of each.

    Args:
        T, C: Of x.
        device, big: Its device and dtype.
        kinds: What `kinds_of` says.
        ranks: Of the blocks.
    """
    widths = [rank_tile("times_small", R) for R in ranks]
    used = [tiles("times_small", BR, capability(device), kinds) for BR in widths]
    columns = max(tile.columns for tile in used)
    in_flight = min((tile.stages - 1) * tile.tokens * tile.columns for tile in used) * big.itemsize
    programs = sum(cdiv(T, tile.tokens) * cdiv(R, BR) for R, BR, tile in zip(ranks, widths, used, strict=True))
    steps = cdiv(C, columns)
    part = cdiv(steps, splits(programs, steps, side_by_side(device, in_flight))) * columns
    return cdiv(C, part), part


@planned
def _plan(
    T: int, integers: tuple[int, ...], parts: int, big: torch.dtype, small: torch.dtype, device: torch.device,
    drop: bool, tf32: bool,
) -> tuple[Record, tuple[int, int, int]]:  # fmt: skip
    """Return the record and the grid of a launch; `integers` as the kernel takes them from C on."""
    (_, R, _, stride_sc, _, stride_out, *_), how = integers, dot_split(big, small)
    BR = rank_tile("times_small", R)
    tile = tiles("times_small", BR, capability(device), kinds_of(big, small, drop))
    made = record(
        times_small_kernel, integers,
        DROP=drop, HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
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
    x, device, kinds = rows(x), x.device, (x.dtype, small.dtype)
    if groups is None or len(groups) == 1:
        kind = kinds_of(*kinds, groups is not None and groups[0].seed is not None)
        parts, part = split(T, C, device, x.dtype, kind, R)
        blocks = [(small, groups[0] if groups else None, R)]
    else:
        blocks = [(small[:, group.columns], group, group.columns.stop - group.columns.start) for group in groups]
        parts, part = split(T, C, device, x.dtype, kinds_of(*kinds, True), *(width for _, _, width in blocks))
    out = x.new_empty((parts, T, R), dtype=dtype if parts == 1 else torch.float32)
    for block, group, width in blocks:
        seed, limit, inverse = mask_arguments(group)
        integers = (C, width, x.stride(0), *block.stride(), R, part, limit)
        made, grid = _plan(T, integers, parts, *kinds, device, seed is not None, in_tf32(x.dtype))
        into = out if group is None or width == R else out[:, :, group.columns]
        launch(made, grid, (x, block, into, seed), (T,), (inverse,))
    return out
