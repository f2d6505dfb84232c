"""The rank-R term beside a library GEMM, in one pass over its output: expand and dx in forms (b)
and (d).

    out = c ⊙ (mask ⊙ base + scale · mask ⊙ (h S)) + extra + bias

Each part is there or not; the sum is made in float32 and rounded once. Form (b) updates what the
GEMM wrote: `out` may be `base` itself. Form (d) has no base yet: it writes what the GEMM then adds
to (beta = 1).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup, mask_arguments
from delora_kernels.backends.triton.device import dropped, in_units, keep_tile, mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    Record,
    dot_split_in_rank,
    in_tf32,
    launch,
    planned,
    precision,
    record,
    rows,
)
from delora_kernels.backends.triton.tables import cdiv, dtypes, multiprocessors, rank_tile, splits, tiles, unit

TURN = 32
"""Ranks of a turn, where there are more than the widest tile takes in one."""

PROGRAMS = 8
"""Of a multiprocessor, each with a few tiles in turn: about what it runs at a time, twice."""


@triton.jit
def _small(S, r, c, R, C, stride_sr, stride_sc):
    """S [BR, BC] of the ranks r and columns c."""
    at = S + r[:, None].to(tl.int64) * stride_sr + c[None, :].to(tl.int64) * stride_sc
    return tl.load(at, (r[:, None] < R) & (c[None, :] < C), 0.0)


@triton.jit(do_not_specialize=["T", "part"])
def rank_update_kernel(
    BASE, H, S, COLUMN, EXTRA, BIAS, SEED, OUT, T, part, C, R,
    stride_base, stride_h, stride_sr, stride_sc, stride_extra, threshold, scale,
    WITH_BASE: tl.constexpr, WITH_COLUMN: tl.constexpr, WITH_EXTRA: tl.constexpr, WITH_BIAS: tl.constexpr,
    MASK_TERM: tl.constexpr, MASK_BASE: tl.constexpr, ONE_TURN: tl.constexpr, STAGES: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, UNIT: tl.constexpr, UNIT_S: tl.constexpr,
):  # fmt: skip
    """Tiles [BT, BC] of out over `part` tokens; parts that are None are left out when it is
    compiled. ONE_TURN: all ranks at once, so that base is loaded ahead and S stays.
    """
    R, stride_h, stride_sc = in_units(R, UNIT), in_units(stride_h, UNIT), in_units(stride_sc, UNIT_S)
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    r = tl.arange(0, BR)
    if ONE_TURN:
        s = _small(S, r, c, R, C, stride_sr, stride_sc)
    if WITH_COLUMN:
        column = tl.load(COLUMN + c, c < C, 0.0)[None, :]
    if WITH_BIAS:
        bias = tl.load(BIAS + c, c < C, 0.0).to(tl.float32)[None, :]
    start = tl.program_id(1).to(tl.int64) * part
    for t0 in tl.range(start, tl.minimum(start + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        inside = (t[:, None] < T) & (c[None, :] < C)
        acc = tl.zeros((BT, BC), tl.float32)
        if ONE_TURN:
            h = tl.load(H + t[:, None] * stride_h + r[None, :], (t[:, None] < T) & (r[None, :] < R), 0.0)
            acc = mixed_dot(h, s, acc, HOW, PRECISION, INTERPRETED)
        else:
            for r0 in range(0, R, BR):
                q = r0 + r
                h = tl.load(H + t[:, None] * stride_h + q[None, :], (t[:, None] < T) & (q[None, :] < R), 0.0)
                s = _small(S, q, c, R, C, stride_sr, stride_sc)
                acc = mixed_dot(h, s, acc, HOW, PRECISION, INTERPRETED)
        acc = acc * scale
        if MASK_BASE:
            acc += tl.load(BASE + t[:, None] * stride_base + c[None, :], inside, 0.0).to(tl.float32)
        if MASK_TERM:
            acc = dropped(acc, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        if WITH_BASE and not MASK_BASE:
            acc += tl.load(BASE + t[:, None] * stride_base + c[None, :], inside, 0.0).to(tl.float32)
        if WITH_COLUMN:
            acc *= column
        if WITH_EXTRA:
            acc += tl.load(EXTRA + t[:, None] * stride_extra + c[None, :], inside, 0.0).to(tl.float32)
        if WITH_BIAS:
            acc += bias
        tl.store(OUT + t[:, None] * C + c[None, :], acc.to(OUT.dtype.element_ty), inside)


@planned
def _plan(
    T: int, integers: tuple[int, ...], h: torch.dtype, small: torch.dtype, out: torch.dtype, device: torch.device,
    tf32: bool, *present: bool,
) -> tuple[Record, tuple[int, int], int]:  # fmt: skip
    """Return the record and the grid of a launch, and the tokens of a program.

    Args:
        T: Tokens.
        integers: As the kernel takes them, from C on.
        h, small, out: Dtypes.
        device: Theirs.
        tf32: Of the product.
        present: Whether the launch has a base, a column, extra, a bias, a mask; whether that masks
            base too.
    """
    (C, R, _, stride_h, _, stride_sc, *_), how = integers, dot_split_in_rank(h, small, out)
    BR = rank_tile("rank_update", R)
    BR = BR if R <= BR else TURN
    kinds = dtypes(out, h, small) or ("mixed" if present[4] else "")
    tile = tiles("rank_update", BR, capability(device), kinds)
    names = ("WITH_BASE", "WITH_COLUMN", "WITH_EXTRA", "WITH_BIAS", "MASK_TERM", "MASK_BASE")
    across, steps = cdiv(C, tile.columns), cdiv(T, tile.tokens)
    part = cdiv(steps, splits(across, steps, PROGRAMS * multiprocessors(device))) * tile.tokens
    made = record(
        rank_update_kernel, integers, **dict(zip(names, present, strict=True)), ONE_TURN=R <= BR,
        HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, UNIT=unit(R, stride_h), UNIT_S=unit(R, stride_sc),
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return made, (across, cdiv(T, part)), part


def rank_update(
    base: Tensor | None, h: Tensor, small: Tensor, scale: float, out: Tensor, *, column: Tensor | None = None,
    extra: Tensor | None = None, bias: Tensor | None = None, group: MaskGroup | None = None, mask_base: bool = False,
) -> Tensor:  # fmt: skip
    """Write the formula above to `out`, which may be `base`, and return it.

    Args:
        base: [T, C], last dimension contiguous; or None.
        h: [T, R].
        small: S, [R, C], any strides.
        scale: Factor of the term; 1 / (1 − p) of a mask is the caller's.
        out: [T, C], contiguous.
        column: c [C] float32, or None.
        extra: [T, C] or None.
        bias: [C] or None.
        group: The mask of the term, or None.
        mask_base: Whether it masks base too.
    """
    (T, C), R = out.shape, h.shape[1]
    if T * C == 0:
        return out
    h, extra = rows(h), None if extra is None else rows(extra)
    bias = None if bias is None else bias.contiguous()
    seed, limit, _ = mask_arguments(group)
    strides = (0 if base is None else base.stride(0), h.stride(0), *small.stride())
    integers = (C, R, *strides, 0 if extra is None else extra.stride(0), limit)
    kinds = (h.dtype, small.dtype, out.dtype)
    present = (base is not None, column is not None, extra is not None, bias is not None, seed is not None, mask_base)
    made, grid, part = _plan(T, integers, *kinds, out.device, in_tf32(out.dtype), *present)
    launch(made, grid, (base, h, small, column, extra, bias, seed, out), (T, part), (scale,))
    return out
