"""Sums over the rows of each expert, of rows sorted by expert: X_eᵀ H_e [C, R], and beside it
Σ_t X_e, from one read of X for each 128 ranks.

That is dÂ_e = dv_eᵀ x_e, and dB̂_e = dy_eᵀ h_e with the bias's gradient. An expert with many rows is
shared out among programs, so that one that all tokens chose takes no longer than many; their parts
are added in a fixed order.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup, mask_arguments
from delora_kernels.backends.triton.device import dropped, keep_tile, mixed_dot
from delora_kernels.backends.triton.grouped_rows import cut, plan, tile_of
from delora_kernels.backends.triton.launch import in_tf32, launch, planned, record, rows
from delora_kernels.backends.triton.tables import cdiv, power_of_2, splits


@triton.jit(do_not_specialize=["T", "part"])
def grouped_sums_kernel(
    X, H, OFFSETS, SEED, PRODUCT, SUMS, PARTS, T, part, C, R, E, stride_x, stride_h, threshold, factor,
    DROP: tl.constexpr, WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, SPLIT: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile [BC, BR] of factor · drop(X_e)ᵀ H_e, transposed, and BC of Σ_t X_e, summed over at
    most `part` rows: to the expert's place if it has no more, else to a place among PARTS.
    """
    e, begins, ends, counts = cut(OFFSETS, T, E, part, 1, BE)
    counts = tl.where(e < E, counts, 0)
    expert, first, end = tile_of(tl.program_id(2), e, begins, ends, counts, part)
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    TURNED: tl.constexpr = DROP and HOW == 0 and X.dtype.element_ty != tl.float32 and BR > 16
    acc = tl.zeros((BR, BC) if TURNED else (BC, BR), tl.float32)
    sums = tl.zeros((BC,), tl.float32)
    for t0 in range(first, tl.minimum(first + part, end), BT):
        t = t0 + tl.arange(0, BT)
        inside = (t[:, None] < end) & (c[None, :] < C)
        x = tl.load(X + t[:, None].to(tl.int64) * stride_x + c[None, :], inside, 0.0)
        if WITH_SUMS:
            sums += tl.sum(x.to(tl.float32), 0)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        if WITH_PRODUCT:
            h_at = H + t[:, None].to(tl.int64) * stride_h + r[None, :]
            h = tl.load(h_at, (t[:, None] < end) & (r[None, :] < R), 0.0)
            if TURNED:  # a masked x comes from registers: as the left operand, instructions wait one by one
                acc = mixed_dot(tl.trans(h), x, acc, HOW, PRECISION, INTERPRETED)
            else:
                acc = mixed_dot(tl.trans(x), h, acc, HOW, PRECISION, INTERPRETED)
    if TURNED:
        acc = tl.trans(acc)
    mine, there = e == expert, expert < E
    alone = there & (tl.sum(tl.where(mine, counts, 0), 0) == 1)
    cell, held = r[None, :] * C + c[:, None], (c[:, None] < C) & (r[None, :] < R)
    if WITH_PRODUCT:
        tl.store(PRODUCT + expert * R * C + cell, acc * factor, held & alone)
    if WITH_SUMS:
        if tl.program_id(1) == 0:
            tl.store(SUMS + expert * C + c, sums, (c < C) & alone)
    if SPLIT:
        before = tl.sum(tl.where((e < expert) & (counts > 1), counts, 0), 0)
        place = before + (first - tl.sum(tl.where(mine, begins, 0), 0)) // part
        # offsets that fall, which nobody reads before, would ask for more places than there are
        at, among = PARTS + place * (R + WITH_SUMS) * C, there & (alone == 0) & (place < 2 * T // part)
        if WITH_PRODUCT:
            tl.store(at + cell, acc * factor, held & among)
        if WITH_SUMS:
            if tl.program_id(1) == 0:
                tl.store(at + R * C + c, sums, (c < C) & among)


BLOCK = 1024
"""Elements of an expert's sums that a program adds up."""


@triton.jit(do_not_specialize=["T", "part"])
def grouped_total_kernel(
    OFFSETS, PARTS, PRODUCT, SUMS, T, part, C, R, E,
    WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, BLOCK: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of what `grouped_sums_kernel` left in parts of one expert, added in their
    order; nothing for an expert that has no parts.
    """
    e, _, _, counts = cut(OFFSETS, T, E, part, 1, BE)
    several = tl.where((e < E) & (counts > 1), counts, 0)
    expert = tl.program_id(1).to(tl.int64)
    parts = tl.sum(tl.where(e == expert, several, 0), 0)
    M = (R + WITH_SUMS) * C
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    at = PARTS + tl.sum(tl.where(e < expert, several, 0), 0) * M + i
    total = tl.zeros((BLOCK,), tl.float32)
    for p in range(parts):
        total += tl.load(at + p * M, i < M, 0.0)
    if WITH_PRODUCT:
        tl.store(PRODUCT + expert * R * C + i, total, (i < R * C) & (parts > 0))
    if WITH_SUMS:
        tl.store(SUMS + expert * C + i - R * C, total, (i >= R * C) & (i < M) & (parts > 0))


@planned
def _part(T: int, E: int, across: int, size: int) -> int:
    """Rows that one program of the sums takes: fewer where the programs of the experts are few."""
    return cdiv(cdiv(T, size), splits(across, cdiv(T, size))) * size


def grouped_sums(
    x: Tensor, h: Tensor | None, offsets: Tensor, sums: bool = False, group: MaskGroup | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """`GroupedStages.sums`: one read of x for each 128 ranks, and where an expert has many rows, a
    launch that adds its parts.
    """
    (T, C), E, R = x.shape, offsets.shape[0], 0 if h is None else h.shape[1]
    product = None if h is None else x.new_empty((E, R, C), dtype=torch.float32)
    summed = x.new_empty((E, C), dtype=torch.float32) if sums else None
    if T * C == 0:
        return None if product is None else product.zero_(), None if summed is None else summed.zero_()
    x, h, (seed, limit, inverse) = rows(x), None if h is None else rows(h), mask_arguments(group)
    integers = (C, R, E, x.stride(0), 0 if h is None else h.stride(0), limit)
    kinds = (x.dtype, x.dtype if h is None else h.dtype, x.device, in_tf32(x.dtype))
    present = (("DROP", seed is not None), ("WITH_PRODUCT", h is not None), ("WITH_SUMS", sums))
    _, across, size = plan(grouped_sums_kernel, T, E, integers, *kinds, (*present, ("SPLIT", False)))
    part = _part(T, E, across[0] * across[1], size)
    made, _, _ = plan(grouped_sums_kernel, T, E, integers, *kinds, (*present, ("SPLIT", part < T)))
    M = (R + sums) * C
    parts = x.new_empty((2 * T // part, M), dtype=torch.float32) if part < T else None  # of experts with two or more
    grid = (*across, T // part + E)  # an expert has one tile at least
    launch(made, grid, (x, h, offsets, seed, product, summed, parts), (T, part), (inverse,))
    if parts is not None:
        adding = record(
            grouped_total_kernel, (C, R, E),
            WITH_PRODUCT=h is not None, WITH_SUMS=sums, BLOCK=BLOCK, BE=power_of_2(E + 1),
        )  # fmt: skip
        launch(adding, (cdiv(M, BLOCK), E), (offsets, parts, product, summed), (T, part))
    return product, summed
