"""The passes over an expert model's tokens, on rows sorted by expert: a token-sized matrix times
each expert's small one, and the rank-R term added onto a grouped GEMM's output.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup, mask_arguments
from delora_kernels.backends.triton.device import dropped, keep_tile, mixed_dot
from delora_kernels.backends.triton.grouped_rows import cut, most_tiles, plan, tile_of
from delora_kernels.backends.triton.launch import in_tf32, launch, rows


@triton.jit(do_not_specialize=["T"])
def grouped_times_small_kernel(
    X, S, OFFSETS, SEED, OUT, T, C, R, E, stride_x, stride_se, stride_sc, stride_sr, threshold, factor,
    DROP: tl.constexpr, HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BR] of factor · drop(X_e) S_e; 0 in rows that are nobody's."""
    e, begins, ends, counts = cut(OFFSETS, T, E, BT, 0, BE)
    expert, first, end = tile_of(tl.program_id(0), e, begins, ends, counts, BT)
    t = first + tl.arange(0, BT)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    acc = tl.zeros((BT, BR), tl.float32)
    for c0 in range(0, tl.where(expert < E, C, 0), BC):
        c = c0 + tl.arange(0, BC)
        x = tl.load(X + t[:, None] * stride_x + c[None, :], (t[:, None] < end) & (c[None, :] < C), 0.0)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        small = S + expert * stride_se + c[:, None].to(tl.int64) * stride_sc + r[None, :] * stride_sr
        s = tl.load(small, (c[:, None] < C) & (r[None, :] < R), 0.0)
        acc = mixed_dot(x, s, acc, HOW, PRECISION, INTERPRETED)
    out = OUT + t[:, None] * R + r[None, :]
    tl.store(out, (acc * factor).to(OUT.dtype.element_ty), (t[:, None] < end) & (r[None, :] < R))


@triton.jit(do_not_specialize=["T"])
def grouped_update_kernel(
    BASE, H, S, BIAS, OFFSETS, SEED, T, C, R, E, stride_base, stride_h, stride_se, stride_sr, stride_sc, threshold,
    factor,
    WITH_BIAS: tl.constexpr, DROP: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BC] of BASE_e + factor · drop(H_e S_e) + bias_e, in place; 0 in rows that are
    nobody's, which are not read.
    """
    e, begins, ends, counts = cut(OFFSETS, T, E, BT, 0, BE)
    across = tl.cdiv(C, BC)  # all programs lie in a grid's first dimension: the others end at 65535
    expert, first, end = tile_of(tl.program_id(0) // across, e, begins, ends, counts, BT)
    t = first + tl.arange(0, BT)
    c0 = tl.program_id(0) % across * BC
    c = c0 + tl.arange(0, BC)
    inside = (t[:, None] < end) & (c[None, :] < C)
    somebodys = expert < E
    acc = tl.zeros((BT, BC), tl.float32)
    for r0 in range(0, tl.where(somebodys, R, 0), BR):
        r = r0 + tl.arange(0, BR)
        h = tl.load(H + t[:, None] * stride_h + r[None, :], (t[:, None] < end) & (r[None, :] < R), 0.0)
        small = S + expert * stride_se + r[:, None].to(tl.int64) * stride_sr + c[None, :].to(tl.int64) * stride_sc
        s = tl.load(small, (r[:, None] < R) & (c[None, :] < C), 0.0)
        acc = mixed_dot(h, s, acc, HOW, PRECISION, INTERPRETED)
    acc = acc * factor
    if DROP:
        acc = dropped(acc, keep_tile(SEED, t, c0, C, threshold, BT, BC))
    at = BASE + t[:, None] * stride_base + c[None, :]
    acc += tl.load(at, inside & somebodys, 0.0).to(tl.float32)
    if WITH_BIAS:
        acc += tl.load(BIAS + expert * C + c, (c < C) & somebodys, 0.0).to(tl.float32)[None, :]
    tl.store(at, acc.to(BASE.dtype.element_ty), inside)


def grouped_times_small(
    x: Tensor, small: Tensor, offsets: Tensor, factor: float, dtype: torch.dtype, group: MaskGroup | None = None
) -> Tensor:
    """`GroupedStages.times_small`: one read of x for each 128 ranks."""
    (T, C), (E, _, R) = x.shape, small.shape
    out = x.new_empty((T, R), dtype=dtype)
    if out.numel() == 0:
        return out
    x, (seed, limit, inverse) = rows(x), mask_arguments(group)
    integers = (C, R, E, x.stride(0), *small.stride(), limit)
    kinds, present = (x.dtype, small.dtype, x.device, in_tf32(x.dtype)), (("DROP", seed is not None),)
    made, (_, across), size = plan(grouped_times_small_kernel, T, E, integers, *kinds, present)
    grid = (most_tiles(T, E + 1, size), across)
    launch(made, grid, (x, small, offsets, seed, out), (T,), (factor * inverse,))
    return out


def grouped_update(
    out: Tensor, h: Tensor, small: Tensor, offsets: Tensor, bias: Tensor | None = None, group: MaskGroup | None = None
) -> None:
    """`GroupedStages.update`: one read and one write of out."""
    (T, C), (E, R, _) = out.shape, small.shape
    if out.numel() == 0:
        return
    h, bias, (seed, limit, inverse) = rows(h), None if bias is None else bias.contiguous(), mask_arguments(group)
    integers = (C, R, E, out.stride(0), h.stride(0), *small.stride(), limit)
    kinds = (out.dtype, small.dtype, out.device, in_tf32(out.dtype))
    present = (("WITH_BIAS", bias is not None), ("DROP", seed is not None))
    made, (across, _), size = plan(grouped_update_kernel, T, E, integers, *kinds, present)
    grid = (across * most_tiles(T, E + 1, size),)
    launch(made, grid, (out, h, small, bias, offsets, seed), (T,), (inverse,))
