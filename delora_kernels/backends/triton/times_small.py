"""A token-sized matrix times a small one, [T, C] · [C, R]: project's h = drop(x) Âᵀ, and dv = dy (c ⊙ B̂).

One read of the token-sized matrix for each 128 ranks. Where there are few tokens, the sum over C is split among
programs, and the parts are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.eager.hashed_dropout import MaskGroup, threshold
from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.backends.triton.device import dropped, keep_tile, mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import INTERPRETED, launch, meeting, precision, rows
from delora_kernels.backends.triton.tables import rank_tile, splits, tiles


@triton.jit(do_not_specialize=["T"])
def times_small_kernel(
    X, S, OUT, SEED, T, C, R, stride_x, stride_sc, stride_sr, part, threshold, factor,
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
    out = OUT + tl.program_id(2).to(tl.int64) * T * R + t[:, None] * R + r[None, :]
    tl.store(out, (acc * factor).to(OUT.dtype.element_ty), (t[:, None] < T) & (r[None, :] < R))


def times_small(x: Tensor, small: Tensor, dtype: torch.dtype, group: MaskGroup | None = None) -> Tensor:
    """x small → [T, R] in `dtype`; with `group`, elements of x are dropped by its mask.

    Args:
        x: [T, C].
        small: [C, R], any strides.
        dtype: Of the result.
        group: The mask, or None.
    """
    (T, C), R = x.shape, small.shape[1]
    if T * R * C == 0:
        return x.new_zeros((T, R), dtype=dtype)
    x = rows(x)
    BR = rank_tile("times_small", R)
    tile = tiles("times_small", BR, capability(x.device))
    grid = (triton.cdiv(T, tile.tokens), triton.cdiv(R, BR))
    steps = triton.cdiv(C, tile.columns)
    parts = splits(grid[0] * grid[1], steps)
    part = triton.cdiv(steps, parts) * tile.columns
    parts = triton.cdiv(C, part)
    out = x.new_empty((parts, T, R), dtype=dtype if parts == 1 else torch.float32)
    seed, p = (None, 0.0) if group is None else (group.seed, group.dropout_p)
    how = meeting(x.dtype, small.dtype)
    launch(
        times_small_kernel, (*grid, parts), (x, small, out, seed),
        (T, C, R, x.stride(0), *small.stride(), part, threshold(p)), (1 / (1 - p),),
        DROP=seed is not None, HOW=how, PRECISION=precision(x.dtype, how), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out[0] if parts == 1 else add_parts(out, dtype)
