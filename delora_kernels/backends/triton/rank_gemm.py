"""One GEMM with a rank-R term in its epilogue, form (c): the output is written once and never read.

    out = c ⊙ (X W + scale · H S) + bias        kept = X W, on request

X [T, D] and W [D, C] with one dimension contiguous, as in x Wᵀ (NT) and dy W (NN). A program takes
one tile [BT, BC] after another (a persistent grid); tensor descriptors (TMA) load it where the
device has them and strides allow. The term is summed in the accumulator of X W itself, and the
epilogue works on halves of the tile: registers are what limits this kernel, so it takes neither
factors wider than X nor dropout, which would need more.
"""

import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.triton.device import mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    PLAIN,
    TensorDescriptor,
    in_tf32,
    launch,
    precision,
    record,
    rows,
)
from delora_kernels.backends.triton.tables import cdiv, gemm_tiles

RANKS = 32
"""Ranks that the term is summed by: the tile with which every variant compiles without a spill."""

DESCRIPTORS_FROM = (9, 0)
"""The compute capability from which tiles are loaded by descriptor."""

GROUP = 8
"""Rows of tiles that programs walk through together, so that they share W's tiles in the cache."""


@triton.jit
def _add_term(
    acc, H, S, t, c, T, C, R, stride_h, stride_sr, stride_sc,
    PRECISION: tl.constexpr, INTERPRETED: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """acc + H S, summed where acc is."""
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        h = tl.load(H + t[:, None] * stride_h + r[None, :], (t[:, None] < T) & (r[None, :] < R), 0.0)
        small = S + r[:, None].to(tl.int64) * stride_sr + c[None, :].to(tl.int64) * stride_sc
        s = tl.load(small, (r[:, None] < R) & (c[None, :] < C), 0.0)
        acc = mixed_dot(h, s, acc, 0, PRECISION, INTERPRETED)
    return acc


@triton.jit
def _store_half(
    acc, COLUMN, BIAS, OUT, t, c, T, C, WITH_COLUMN: tl.constexpr, WITH_BIAS: tl.constexpr
):  # fmt: skip
    """Return what comes after the sums: c and bias, on a half of the tile."""
    if WITH_COLUMN:
        acc *= tl.load(COLUMN + c, c < C, 0.0)[None, :]
    if WITH_BIAS:
        acc += tl.load(BIAS + c, c < C, 0.0).to(tl.float32)[None, :]
    tl.store(OUT + t[:, None] * C + c[None, :], acc.to(OUT.dtype.element_ty), (t[:, None] < T) & (c[None, :] < C))


@triton.jit
def _store(
    acc, COLUMN, BIAS, OUT, t, c0, T, C,
    WITH_COLUMN: tl.constexpr, WITH_BIAS: tl.constexpr, BT: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    left, right = tl.split(tl.permute(tl.reshape(acc, (BT, 2, BC // 2)), (0, 2, 1)))
    c = c0 + tl.arange(0, BC // 2)
    _store_half(left, COLUMN, BIAS, OUT, t, c, T, C, WITH_COLUMN, WITH_BIAS)
    _store_half(right, COLUMN, BIAS, OUT, t, c + BC // 2, T, C, WITH_COLUMN, WITH_BIAS)


@triton.jit(do_not_specialize=["T", "programs"])
def rank_gemm_kernel(
    X, W, H, S, COLUMN, BIAS, OUT, KEPT, T, programs, C, D, R,
    stride_x, stride_w, stride_h, stride_sr, stride_sc, scale,
    TMA: tl.constexpr, ROWS: tl.constexpr, WITH_COLUMN: tl.constexpr, WITH_BIAS: tl.constexpr,
    KEEP: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BD: tl.constexpr, BR: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Tiles [BT, BC] of out; ROWS: W's memory is [C, D], as in x Wᵀ, else [D, C]."""
    tiles_t, tiles_c = (T + BT - 1) // BT, (C + BC - 1) // BC
    for tile in range(tl.program_id(0), tiles_t * tiles_c, programs):
        first = tile // (GROUP * tiles_c) * GROUP
        height = tl.minimum(tiles_t - first, GROUP)
        t0 = (first + tile % (GROUP * tiles_c) % height) * BT
        c0 = tile % (GROUP * tiles_c) // height * BC
        t = t0.to(tl.int64) + tl.arange(0, BT)
        c = c0 + tl.arange(0, BC)
        acc = tl.zeros((BT, BC), tl.float32)
        if not KEEP:  # the term first: the K loop adds to it where it stands
            acc = scale * _add_term(
                acc, H, S, t, c, T, C, R, stride_h, stride_sr, stride_sc, PRECISION, INTERPRETED, BR
            )
        for d0 in range(0, D, BD):
            if TMA:
                x = X.load([t0, d0])
                w = W.load([c0, d0]).T if ROWS else W.load([d0, c0])
            else:
                d = d0 + tl.arange(0, BD)
                x = tl.load(X + t[:, None] * stride_x + d[None, :], (t[:, None] < T) & (d[None, :] < D), 0.0)
                inside = (d[:, None] < D) & (c[None, :] < C)
                if ROWS:
                    w = tl.load(W + c[None, :].to(tl.int64) * stride_w + d[:, None], inside, 0.0)
                else:
                    w = tl.load(W + d[:, None].to(tl.int64) * stride_w + c[None, :], inside, 0.0)
            acc = mixed_dot(x, w, acc, 0, PRECISION, INTERPRETED)
        if KEEP:  # the term last, in the same registers
            _store(acc, COLUMN, BIAS, KEPT, t, c0, T, C, False, False, BT, BC)
            acc = acc / scale
            acc = scale * _add_term(
                acc, H, S, t, c, T, C, R, stride_h, stride_sr, stride_sc, PRECISION, INTERPRETED, BR
            )
        _store(acc, COLUMN, BIAS, OUT, t, c0, T, C, WITH_COLUMN, WITH_BIAS, BT, BC)


def takes(x: Tensor, h: Tensor, small: Tensor, scale: float, keep: bool, group: MaskGroup | None) -> bool:
    """Whether this GEMM does it: one dtype of 16 bits, nothing dropped, and a scale to divide by
    where X W is kept.
    """
    plain = x.dtype == h.dtype == small.dtype and (x.dtype.itemsize == 2 or INTERPRETED)
    return plain and (group is None or group.seed is None) and not (keep and scale == 0)


def rank_gemm(
    x: Tensor, w: Tensor, h: Tensor, small: Tensor, scale: float, *, column: Tensor | None = None,
    bias: Tensor | None = None, keep: bool = False,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """out [T, C] by the formula above, in x's dtype, and kept or None.

    Args:
        x: [T, D], any row stride.
        w: [D, C], one dimension contiguous.
        h: [T, R], in x's dtype.
        small: S, [R, C], in x's dtype, any strides.
        scale: Factor of the term.
        column: c [C] float32, or None.
        bias: [C] or None.
        keep: Whether X W is wanted too.
    """
    (T, D), C, R = x.shape, w.shape[1], h.shape[1]
    out = x.new_empty((T, C))
    kept = x.new_empty((T, C)) if keep else None
    if T * C == 0:
        return out, kept
    x, h, bias = rows(x), rows(h), None if bias is None else bias.contiguous()
    by_rows = w.stride(0) == 1
    matrix = w.t() if by_rows else rows(w)
    device = capability(x.device)
    tma = device >= DESCRIPTORS_FROM and _loads_by_descriptor(x) and _loads_by_descriptor(matrix)
    tile = gemm_tiles("descriptors" if tma else "pointers", device)
    tiles = cdiv(T, tile.tokens) * cdiv(C, tile.columns)
    programs = min(tile.programs, tiles) or tiles
    left, right = (tile.tokens, tile.inner), (tile.columns, tile.inner) if by_rows else (tile.inner, tile.columns)
    X = TensorDescriptor.from_tensor(x, list(left)) if tma else x
    W = TensorDescriptor.from_tensor(matrix, list(right)) if tma else matrix
    made = record(
        rank_gemm_kernel, (C, D, R, x.stride(0), matrix.stride(0), h.stride(0), *small.stride()),
        TMA=tma, ROWS=by_rows, WITH_COLUMN=column is not None, WITH_BIAS=bias is not None, KEEP=keep,
        PRECISION=precision(PLAIN, in_tf32(x.dtype)), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BD=tile.inner, BR=RANKS, GROUP=GROUP,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    launch(made, (programs,), (X, W, h, small, column, bias, out, kept), (T, programs), (scale,))
    return out, kept


def _loads_by_descriptor(matrix: Tensor) -> bool:
    """Whether the hardware's tile loads take this matrix: rows 16 bytes apart, and a start that is
    aligned likewise.
    """
    if TensorDescriptor is None or matrix.stride(1) != 1:
        return False
    return matrix.stride(0) * matrix.element_size() % 16 == 0 and matrix.data_ptr() % 16 == 0
