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
from delora_kernels.backends.triton.device import dropped, keep_tile, mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import INTERPRETED, dot_split, launch, precision, rows
from delora_kernels.backends.triton.tables import rank_tile, splits, tiles


@triton.jit(do_not_specialize=["T"])
def times_small_kernel(
    X, S, OUT, SEED, T, C, R, stride_x, stride_sc, stride_sr, stride_out, part, threshold, factor,
    DROP: tl.constexpr, HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BR] of factor · drop(X) S, summed over this program's `part` of C."""
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


def split(x: Tensor, ranks: Sequence[int]) -> tuple[int, int]:
    """Into how many parts the sum over C of x times blocks of these ranks is split, and the columns
    of each.
    """
    widths = [rank_tile("times_small", R) for R in ranks]
    used = [tiles("times_small", BR, capability(x.device)) for BR in widths]
    columns = max(tile.columns for tile in used)
    programs = sum(
        triton.cdiv(x.shape[0], tile.tokens) * triton.cdiv(R, BR)
        for R, BR, tile in zip(ranks, widths, used, strict=True)
    )
    steps = triton.cdiv(x.shape[1], columns)
    part = triton.cdiv(steps, splits(programs, steps)) * columns
    return triton.cdiv(x.shape[1], part), part


def times_small_parts(
    x: Tensor, small: Tensor, dtype: torch.dtype, groups: Sequence[MaskGroup] | None = None
) -> Tensor:
    """Return the parts of x small: `Stages.times_small_parts`; a launch and a read of x for each
    mask.
    """
    (T, C), R = x.shape, small.shape[1]
    if T * R * C == 0:
        return x.new_zeros((1, T, R), dtype=dtype)
    x = rows(x)
    groups = groups or [MaskGroup(slice(0, R), 0.0, None)]
    blocks = [small[:, group.columns] for group in groups]
    parts, part = split(x, [block.shape[1] for block in blocks])
    out = x.new_empty((parts, T, R), dtype=dtype if parts == 1 else torch.float32)
    how = dot_split(x.dtype, small.dtype)
    for block, group in zip(blocks, groups, strict=True):
        seed, limit, inverse = mask_arguments(group)
        BR = rank_tile("times_small", block.shape[1])
        tile = tiles("times_small", BR, capability(x.device))
        launch(
            times_small_kernel, (triton.cdiv(T, tile.tokens), triton.cdiv(block.shape[1], BR), parts),
            (x, block, out[:, :, group.columns], seed),
            (T, C, block.shape[1], x.stride(0), *block.stride(), R, part, limit), (inverse,),
            DROP=seed is not None, HOW=how, PRECISION=precision(x.dtype, how), INTERPRETED=INTERPRETED,
            BT=tile.tokens, BC=tile.columns, BR=BR, num_warps=tile.warps, num_stages=tile.stages,
        )  # fmt: skip
    return out
