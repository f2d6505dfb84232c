"""Sums over tokens: Xᵀ H [C, R], and beside it Σ_t X and Σ_t X ⊙ Y [C], from one read of X for each
128 ranks.

That is dÂ = dvᵀ drop(x) and dB̂ = dyᵀ h, with the bias's gradient and DoRA's Σ_t dy ⊙ u. Tokens are
split among programs; `add_parts.py` adds their parts in a fixed order. While a program holds H = dv
it can also write the rank-R term of dx, H S, where a library GEMM then adds the rest (form (d)).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup, mask_arguments
from delora_kernels.backends.library_gemm import DyParts, WrittenTerm
from delora_kernels.backends.triton.device import dropped, in_units, keep_tile, lane_sums, mixed_dot
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
from delora_kernels.backends.triton.tables import (
    TABLES,
    cdiv,
    dtypes,
    lanes,
    rank_tile,
    side_by_side,
    splits,
    tiles,
    unit,
)


@triton.jit(do_not_specialize=["T", "part"])
def token_sums_kernel(
    X, H, Y, S, SEED, PRODUCT, SUMS, DOTS, OUT, T, part, C, R, ranks,
    stride_x, stride_h, stride_y, stride_sr, stride_sc, threshold, factor,
    DROP: tl.constexpr, WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, WITH_DOTS: tl.constexpr,
    WITH_OUT: tl.constexpr, TRANSPOSED: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """One tile [BC, BR] of factor · drop(X)ᵀ H and BC of each vector, summed over `part` tokens;
    factor · H S.
    """
    R, ranks, stride_h = in_units(R, UNIT), in_units(ranks, UNIT), in_units(stride_h, UNIT)
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    r = tl.program_id(1) * BR + tl.arange(0, BR)
    TURNED: tl.constexpr = DROP and HOW == 0 and X.dtype.element_ty != tl.float32
    acc = tl.zeros((BR, BC) if TURNED else (BC, BR), tl.float32)
    sums = tl.zeros((LANES, BC), tl.float32)
    dots = tl.zeros((LANES, BC), tl.float32)
    if WITH_OUT:
        small = S + r[:, None].to(tl.int64) * stride_sr + c[None, :].to(tl.int64) * stride_sc
        s = tl.load(small, (r[:, None] < R) & (c[None, :] < C), 0.0)
    start = tl.program_id(2).to(tl.int64) * part
    for t0 in tl.range(start, tl.minimum(start + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT)
        inside = (t[:, None] < T) & (c[None, :] < C)
        x = tl.load(X + t[:, None].to(tl.int64) * stride_x + c[None, :], inside, 0.0)
        if WITH_SUMS:
            sums += lane_sums(x.to(tl.float32), LANES)
        if WITH_DOTS:
            y = tl.load(Y + t[:, None].to(tl.int64) * stride_y + c[None, :], inside, 0.0)
            dots += lane_sums(x.to(tl.float32) * y.to(tl.float32), LANES)
        if DROP:
            x = dropped(x, keep_tile(SEED, t, c0, C, threshold, BT, BC))
        if WITH_PRODUCT:
            h_at = H + t[:, None].to(tl.int64) * stride_h + r[None, :]
            h = tl.load(h_at, (t[:, None] < T) & (r[None, :] < R), 0.0)
            if TURNED:  # a masked x comes from registers: as the left operand, instructions wait one by one
                acc = mixed_dot(tl.trans(h), x, acc, HOW, PRECISION, INTERPRETED)
            else:
                acc = mixed_dot(tl.trans(x), h, acc, HOW, PRECISION, INTERPRETED)
            if WITH_OUT:
                term = mixed_dot(h, s, tl.zeros((BT, BC), tl.float32), 0, PRECISION, INTERPRETED) * factor
                tl.store(OUT + t[:, None].to(tl.int64) * C + c[None, :], term.to(OUT.dtype.element_ty), inside)
    which = tl.program_id(2).to(tl.int64)
    if TURNED:
        acc = tl.trans(acc)
    if WITH_PRODUCT:
        if TRANSPOSED:
            at = PRODUCT + (which * ranks + r[None, :]) * C + c[:, None]
        else:
            at = PRODUCT + (which * C + c[:, None]) * ranks + r[None, :]
        tl.store(at, acc * factor, (c[:, None] < C) & (r[None, :] < ranks))
    if tl.program_id(1) == 0:
        if WITH_SUMS:
            tl.store(SUMS + which * C + c, tl.sum(sums, 0), c < C)
        if WITH_DOTS:
            tl.store(DOTS + which * C + c, tl.sum(dots, 0), c < C)


def takes_term(x: Tensor, h: Tensor, small: Tensor, group: MaskGroup) -> bool:
    """Whether the term can be written on the way: one 16-bit dtype and no dropout (for more,
    registers do not do), and
    all of H's columns in one program."""
    plain = x.dtype == h.dtype == small.dtype and (x.dtype.itemsize == 2 or INTERPRETED) and group.seed is None
    return plain and h.shape[1] <= _most_ranks()


@planned
def _most_ranks() -> int:
    return max(int(limit) for limit in TABLES["token_sums"])


@planned
def _plan(
    T: int, integers: tuple[int, ...], big: torch.dtype, h: torch.dtype, device: torch.device, tf32: bool,
    *present: bool,
) -> tuple[Record, tuple[int, int], int, int]:  # fmt: skip
    """Return the record of a launch, the first two sides of its grid, its parts and the tokens of
    one.

    Args:
        T: Tokens.
        integers: As the kernel takes them, from C on.
        big, h: The dtypes of x and h.
        device: Theirs.
        tf32: Of x's products.
        present: Whether the launch has a mask, a product, sums, dots, a term; whether the product
            is transposed.
    """
    (C, R, ranks, _, stride_h, *_), how = integers, dot_split(big, h)
    BR = rank_tile("token_sums", R)
    tile = tiles("token_sums", BR, capability(device), dtypes(big, h) or ("dropped" if present[0] else ""))
    across, steps = (cdiv(C, tile.columns), max(1, cdiv(R, BR))), cdiv(T, tile.tokens)
    part = cdiv(steps, splits(across[0] * across[1], steps, side_by_side(device))) * tile.tokens
    names = ("DROP", "WITH_PRODUCT", "WITH_SUMS", "WITH_DOTS", "WITH_OUT", "TRANSPOSED")
    made = record(
        token_sums_kernel, integers, **dict(zip(names, present, strict=True)),
        HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, LANES=lanes(tile, big), STAGES=tile.stages,
        UNIT=unit(R, ranks, stride_h), num_warps=tile.warps,
    )  # fmt: skip
    return made, across, cdiv(T, part), part


def token_sums(
    x: Tensor, h: Tensor | None, factor: float = 1.0, *, sums: bool = False, y: Tensor | None = None,
    group: MaskGroup | None = None, transposed: bool = False, ranks: int | None = None, term: WrittenTerm | None = None,
) -> DyParts:  # fmt: skip
    """As `TokenSums`: one read of x for each 128 ranks."""
    (T, C), R = x.shape, 0 if h is None else h.shape[1]
    ranks = R if ranks is None else ranks
    shape = (ranks, C) if transposed else (C, ranks)
    if T * C == 0:
        zeros = x.new_zeros((1, C), dtype=torch.float32)
        product = None if h is None else x.new_zeros((1, *shape), dtype=torch.float32)
        return DyParts(None, product, zeros if sums else None, None if y is None else zeros.clone())
    x, h, y = rows(x), None if h is None else rows(h), None if y is None else rows(y)
    seed, limit, inverse = mask_arguments(group)
    small, out = (None, None) if term is None else term
    strides = (x.stride(0), 0 if h is None else h.stride(0), 0 if y is None else y.stride(0))
    integers = (C, R, ranks, *strides, *((0, 0) if small is None else small.stride()), limit)
    present = (seed is not None, h is not None, sums, y is not None, term is not None, transposed)
    kinds = (x.dtype, x.dtype if h is None else h.dtype)
    made, across, parts, part = _plan(T, integers, *kinds, x.device, in_tf32(x.dtype), *present)
    product = None if h is None else x.new_empty((parts, *shape), dtype=torch.float32)
    summed = x.new_empty((parts, C), dtype=torch.float32) if sums else None
    dots = None if y is None else x.new_empty((parts, C), dtype=torch.float32)
    tensors = (x, h, y, small, seed, product, summed, dots, out)
    launch(made, (*across, parts), tensors, (T, part), (factor * inverse,))
    return DyParts(None, product, summed, dots)
