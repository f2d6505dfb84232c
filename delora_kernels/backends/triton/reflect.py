"""ETHER's block reflections and their gradients: one read of x (and dy), one write, no norm and no
square root.

With a = (x·u) / (u·u) and b = (dy·u) / (u·u) of every token and block, 0 where u is 0, and c = 2
(with v: c = 1):

    x' = x − c a u [+ a_v v]                  g = Σ_t a dy + b x
    dx = dy − c b u [+ b_v v]             du = −c (g − (g·u) / (u·u) u)
                                          dv = g_v − (g_v·v) / (v·v) v

A program holds u and v of one block and walks through tokens, whose next ones are loaded ahead. Of
blocks that are too large for that (`LARGEST`) the gradients take a and b from what `reflect` writes
on request and read x and dy again, and `reflect` itself reads x a second time, from the cache.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.backends.triton.device import lane_sums
from delora_kernels.backends.triton.launch import Record, launch, planned, record, rows
from delora_kernels.backends.triton.tables import Tiles, cdiv, lanes, multiprocessors, padded, splits

LARGEST = 32 << 10
"""Bytes of the largest row of a block that a program holds; in the gradients half of that, of dy
and of x.
"""
STAGED = 96 << 10
"""Bytes that wait in shared memory for the next steps, which every GPU has: three of LARGEST."""
REGISTERS = 128
"""Of a thread, so that two programs of 8 warps run on a multiprocessor, or one of 16."""
CHUNK, SUMS = Tiles(8, 256, 8, 3), Tiles(32, 256, 8, 3)
"""Tiles of blocks above LARGEST: of `reflect`, and of the sums over tokens."""


def whole(D: int, held: int, beside: int = 0) -> Tiles | None:
    """Return the tile of whole blocks of D features; None: a program can't hold them.

    Args:
        D: Features of a block.
        held: Bytes that a step loads for each, of x or of dy and x.
        beside: The same of a bias.
    """
    features = padded(D)
    if features * held > LARGEST:
        return None
    tokens = max(1, min(32, 4096 // features))
    stages = min(4, 1 + STAGED // ((tokens * held + beside) * features))
    return Tiles(tokens, features, 16 if features > 4096 else 8 if tokens * features > 1024 else 4, stages)


def chunk_sums(dtype: torch.dtype) -> Tiles:
    """Return the tile of sums over tokens: of wider elements so many that they take no more
    room.
    """
    return SUMS._replace(tokens=max(1, 2 * SUMS.tokens // dtype.itemsize))


class Share(NamedTuple):
    """A launch over blocks and tokens: its record, programs, the tokens of each."""

    record: Record
    programs: int
    part: int


def _tokens(T: int, n: int, tile: Tiles, device: torch.device) -> int:
    """Of a program, where blocks (or chunks) n walk through T tokens on all multiprocessors."""
    steps = cdiv(T, tile.tokens)
    side_by_side = multiprocessors(device) * (1 if tile.warps > 8 else 2)
    return cdiv(steps, splits(n, steps, side_by_side)) * tile.tokens


@triton.jit
def _over(dot, square):
    """dot / square, 0 where the square is 0: a vector of length 0 has no direction."""
    return tl.where(square == 0.0, 0.0, dot / tl.where(square == 0.0, 1.0, square))


@triton.jit
def _load(POINTER, t, c, stride, inside):
    return tl.load(POINTER + t[:, None] * stride + c[None, :], inside, 0.0).to(tl.float32)


@triton.jit
def _vector(POINTER, c, inside):
    return tl.load(POINTER + c, inside, 0.0).to(tl.float32)


@triton.jit
def _store_along(ALONG, at, a_u, a_v, inside, WITH_V: tl.constexpr):
    """Keep the places `at` of a, [T, n, 2] or without v [T, n]."""
    if WITH_V:
        place = 2 * at[:, None] + tl.arange(0, 2)[None, :]
        tl.store(ALONG + place, tl.join(a_u, a_v), inside[:, None])
    else:
        tl.store(ALONG + at, a_u, inside)


@triton.jit
def _load_along(ALONG, at, inside):
    """Return a_u and a_v of the places `at`."""
    return tl.split(tl.load(ALONG + (2 * at[:, None] + tl.arange(0, 2)[None, :]), inside[:, None], 0.0))


@triton.jit(do_not_specialize=["T", "part"])
def reflect_kernel(
    X, U, V, BIAS, OUT, ALONG, T, part, C, D, n, stride_x,
    WITH_V: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_OUT: tl.constexpr, WITH_ALONG: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block i of `part` tokens, x' and a, [T, n, 1 or 2]; all dots of a step are one exchange
    between threads.
    """
    i = tl.program_id(0) % n
    d = tl.arange(0, BD)
    c = i * D + d
    u = _vector(U, c, d < D)
    uu = tl.sum(u * u, 0)
    if WITH_V:
        v = _vector(V, c, d < D)
        vv = tl.sum(v * v, 0)
    start = (tl.program_id(0) // n).to(tl.int64) * part
    for t0 in tl.range(start, tl.minimum(start + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = _load(X, t, c, stride_x, inside)
        if WITH_V:
            xu, xv = tl.split(tl.sum(tl.join(x * u[None, :], x * v[None, :]), 1))
            a_u, a_v = _over(xu, uu), _over(xv, vv)
            out = x + (a_v[:, None] * v[None, :] - a_u[:, None] * u[None, :])
        else:
            a_u = _over(tl.sum(x * u[None, :], 1), uu)
            out = x - 2.0 * a_u[:, None] * u[None, :]
        if WITH_ALONG:
            _store_along(ALONG, t * n + i, a_u, a_v if WITH_V else a_u, t < T, WITH_V)
        if WITH_OUT:
            if WITH_BIAS:  # read again in each step: registers are few
                out += _vector(BIAS, c, d < D)[None, :]
            tl.store(OUT + t[:, None] * C + c[None, :], out.to(OUT.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T"])
def reflect_chunked_kernel(
    X, U, V, BIAS, OUT, ALONG, T, C, D, n, stride_x,
    WITH_V: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_OUT: tl.constexpr, WITH_ALONG: tl.constexpr,
    BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Do the same for block i of BT tokens, read twice: the second time from the cache."""
    i = tl.program_id(0) % n
    t = (tl.program_id(0) // n).to(tl.int64) * BT + tl.arange(0, BT)
    xu = tl.zeros((BT, BD), tl.float32)
    xv = tl.zeros((BT, BD), tl.float32)
    uu = tl.zeros((BD,), tl.float32)
    vv = tl.zeros((BD,), tl.float32)
    for d0 in tl.range(0, D, BD, num_stages=STAGES):
        d = d0 + tl.arange(0, BD)
        x = _load(X, t, i * D + d, stride_x, (t[:, None] < T) & (d[None, :] < D))
        u = _vector(U, i * D + d, d < D)
        xu += x * u[None, :]
        uu += u * u
        if WITH_V:
            v = _vector(V, i * D + d, d < D)
            xv += x * v[None, :]
            vv += v * v
    a_u = _over(tl.sum(xu, 1), tl.sum(uu, 0))
    a_v = _over(tl.sum(xv, 1), tl.sum(vv, 0))
    if WITH_ALONG:
        _store_along(ALONG, t * n + i, a_u, a_v, t < T, WITH_V)
    if WITH_OUT:
        for d0 in tl.range(0, D, BD, num_stages=STAGES):
            d = d0 + tl.arange(0, BD)
            c = i * D + d
            inside = (t[:, None] < T) & (d[None, :] < D)
            out = _load(X, t, c, stride_x, inside)
            u = _vector(U, c, d < D)
            if WITH_V:
                out += a_v[:, None] * _vector(V, c, d < D)[None, :] - a_u[:, None] * u[None, :]
            else:
                out -= 2.0 * a_u[:, None] * u[None, :]
            if WITH_BIAS:
                out += _vector(BIAS, c, d < D)[None, :]
            tl.store(OUT + t[:, None] * C + c[None, :], out.to(OUT.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "part"])
def reflect_backward_kernel(
    DY, X, U, V, DX, PARTS, T, part, C, D, n, stride_dy, stride_x,
    WITH_V: tl.constexpr, WITH_DX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Block i of `part` tokens: dx, and the sums g_u and g_v of this part, [parts, 1 or 2, C]."""
    i = tl.program_id(0) % n
    which = (tl.program_id(0) // n).to(tl.int64)
    d = tl.arange(0, BD)
    c = i * D + d
    u = _vector(U, c, d < D)
    uu = tl.sum(u * u, 0)
    if WITH_V:
        v = _vector(V, c, d < D)
        vv = tl.sum(v * v, 0)
    g_u = tl.zeros((BT, BD), tl.float32)
    g_v = tl.zeros((BT, BD), tl.float32)
    for t0 in tl.range(which * part, tl.minimum(which * part + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = _load(X, t, c, stride_x, inside)
        dy = _load(DY, t, c, stride_dy, inside)
        along = tl.join(x * u[None, :], dy * u[None, :])
        if WITH_V:
            along, of_v = tl.split(tl.sum(tl.join(along, tl.join(x * v[None, :], dy * v[None, :])), 1))
            a_v, b_v = tl.split(_over(of_v, vv))
            g_v += a_v[:, None] * dy + b_v[:, None] * x
        else:
            along = tl.sum(along, 1)
        a_u, b_u = tl.split(_over(along, uu))
        g_u += a_u[:, None] * dy + b_u[:, None] * x
        if WITH_DX:
            if WITH_V:
                dx = dy + (b_v[:, None] * v[None, :] - b_u[:, None] * u[None, :])
            else:
                dx = dy - 2.0 * b_u[:, None] * u[None, :]
            tl.store(DX + t[:, None] * C + c[None, :], dx.to(DX.dtype.element_ty), inside)
    if WITH_V:
        tl.store(PARTS + which * 2 * C + c, tl.sum(g_u, 0), d < D)
        tl.store(PARTS + which * 2 * C + C + c, tl.sum(g_v, 0), d < D)
    else:
        tl.store(PARTS + which * C + c, tl.sum(g_u, 0), d < D)


@triton.jit(do_not_specialize=["T", "part"])
def reflect_sums_kernel(
    DY, X, A, B, PARTS, T, part, C, D, n, stride_dy, stride_x,
    WITH_V: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr, LANES: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Sum up the same parts from a and b, BD features of a block and `part` tokens a program."""
    chunks = (D + BD - 1) // BD
    i = tl.program_id(0) // chunks
    d = tl.program_id(0) % chunks * BD + tl.arange(0, BD)
    c = i * D + d
    which = tl.program_id(1).to(tl.int64)
    g_u = tl.zeros((LANES, BD), tl.float32)
    g_v = tl.zeros((LANES, BD), tl.float32)
    for t0 in tl.range(which * part, tl.minimum(which * part + part, T), BT, num_stages=STAGES):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = _load(X, t, c, stride_x, inside)
        dy = _load(DY, t, c, stride_dy, inside)
        if WITH_V:
            a_u, a_v = _load_along(A, t * n + i, t < T)
            b_u, b_v = _load_along(B, t * n + i, t < T)
            g_v += lane_sums(a_v[:, None] * dy + b_v[:, None] * x, LANES)
        else:
            a_u, b_u = _vector(A, t * n + i, t < T), _vector(B, t * n + i, t < T)
        g_u += lane_sums(a_u[:, None] * dy + b_u[:, None] * x, LANES)
    if WITH_V:
        tl.store(PARTS + which * 2 * C + c, tl.sum(g_u, 0), d < D)
        tl.store(PARTS + which * 2 * C + C + c, tl.sum(g_v, 0), d < D)
    else:
        tl.store(PARTS + which * C + c, tl.sum(g_u, 0), d < D)


@triton.jit
def across_kernel(G, U, V, DU, DV, C, D, n, WITH_V: tl.constexpr, BD: tl.constexpr):
    """Block i of du (programs below n) or dv: the sums g without their part along the vector,
    signed and scaled.
    """
    i = tl.program_id(0) % n
    is_v = tl.program_id(0) // n
    gu = tl.zeros((BD,), tl.float32)
    uu = tl.zeros((BD,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        u = tl.load(U + i * D + d, (d < D) & (is_v == 0), 0.0).to(tl.float32)
        if WITH_V:
            u += tl.load(V + i * D + d, (d < D) & (is_v == 1), 0.0).to(tl.float32)
        gu += tl.load(G + is_v * C + i * D + d, d < D, 0.0) * u
        uu += u * u
    along = _over(tl.sum(gu, 0), tl.sum(uu, 0))
    sign = tl.where(is_v == 1, 1.0, -1.0 if WITH_V else -2.0)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        u = tl.load(U + i * D + d, (d < D) & (is_v == 0), 0.0).to(tl.float32)
        if WITH_V:
            u += tl.load(V + i * D + d, (d < D) & (is_v == 1), 0.0).to(tl.float32)
        out = sign * (tl.load(G + is_v * C + i * D + d, d < D, 0.0) - along * u)
        tl.store(DU + i * D + d, out, (d < D) & (is_v == 0))
        if WITH_V:
            tl.store(DV + i * D + d, out, (d < D) & (is_v == 1))


def reflect(x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None) -> Tensor:
    """x reflected, + bias, [T, C]: one launch."""
    out = x.new_empty(x.shape)
    if x.numel():
        vectors = u.contiguous(), None if v is None else v.contiguous()
        _reflect(rows(x), *vectors, None if bias is None else bias.contiguous(), out, None)
    return out


def _reflect(
    x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None, out: Tensor | None, along: Tensor | None
) -> None:
    """Write x' and a [T, n, 1 or 2] to those that are there."""
    (T, C), (n, D) = x.shape, u.shape
    present = (v is not None, bias is not None, out is not None, along is not None)
    share = _reflecting(T, (C, D, n, x.stride(0)), x.dtype.itemsize, x.device, *present)
    free = (T, share.part) if share.record.kernel is reflect_kernel else (T,)
    launch(share.record, (share.programs,), (x, u, v, bias, out, along), free)


@planned
def _reflecting(T: int, integers: tuple[int, ...], itemsize: int, device: torch.device, *present: bool) -> Share:
    """Plan `reflect`; `integers` as the kernel takes them, `present`: what the launch has of v,
    bias, x', a.
    """
    _, D, n, _ = integers
    found = whole(D, itemsize, itemsize * present[1])
    kernel, tile = (reflect_chunked_kernel, CHUNK) if found is None else (reflect_kernel, found)
    part = CHUNK.tokens if found is None else _tokens(T, n, tile, device)
    names = ("WITH_V", "WITH_BIAS", "WITH_OUT", "WITH_ALONG")
    made = record(
        kernel, integers, **dict(zip(names, present, strict=True)),
        BT=tile.tokens, BD=tile.columns, STAGES=tile.stages, num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    return Share(made, n * cdiv(T, part), part)


@planned
def _summing(
    T: int, integers: tuple[int, ...], dtype: torch.dtype, device: torch.device, plus: bool, with_dx: bool
) -> Share:
    """Plan what adds up g of dy and x in `dtype`; `integers` as its kernel takes them."""
    _, D, n, *_ = integers
    tile = whole(D, 2 * dtype.itemsize)
    if tile is None:
        tile = chunk_sums(dtype)
        chunks = n * cdiv(D, tile.columns)
        made = record(
            reflect_sums_kernel, integers, WITH_V=plus, BT=tile.tokens, BD=tile.columns,
            LANES=lanes(tile, dtype), STAGES=tile.stages, num_warps=tile.warps, maxnreg=REGISTERS,
        )  # fmt: skip
        return Share(made, chunks, _tokens(T, chunks, tile, device))
    part = _tokens(T, n, tile, device)
    made = record(
        reflect_backward_kernel, integers, WITH_V=plus, WITH_DX=with_dx,
        BT=tile.tokens, BD=tile.columns, STAGES=tile.stages, num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    return Share(made, n * cdiv(T, part), part)


def reflect_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, du, dv: tokens are split among programs, their sums added in a fixed order, then made
    orthogonal to u and v.
    """
    (T, C), (n, D) = x.shape, u.shape
    dx, m = dy.new_empty((T, C) if need_dx else 0), 1 if v is None else 2
    du = u.new_empty((n, D), dtype=torch.float32)
    dv = du.new_empty(0 if v is None else (n, D))
    if T * C == 0:
        return dx, du.zero_(), dv.zero_()
    dy, x, u, v = rows(dy), rows(x), u.contiguous(), None if v is None else v.contiguous()
    wider = max(dy.dtype, x.dtype, key=lambda dtype: dtype.itemsize)
    share = _summing(T, (C, D, n, dy.stride(0), x.stride(0)), wider, x.device, v is not None, need_dx)
    parts = du.new_empty((cdiv(T, share.part), m, C))
    if share.record.kernel is reflect_backward_kernel:
        launch(share.record, (share.programs,), (dy, x, u, v, dx, parts), (T, share.part))
    else:
        a, b = (du.new_empty((T, n, m)) for _ in range(2))
        _reflect(x, u, v, None, None, a)
        _reflect(dy, u, v, None, dx if need_dx else None, b)
        launch(share.record, (share.programs, parts.shape[0]), (dy, x, a, b, parts), (T, share.part))
    sums = add_parts(parts, torch.float32)
    across = record(across_kernel, (C, D, n), WITH_V=v is not None, BD=min(2048, padded(D)))
    launch(across, (n * m,), (sums, u, v, du, dv))
    return dx, du, dv
