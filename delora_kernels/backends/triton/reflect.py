"""ETHER's block reflections and their gradients: one read of x (and dy), one write, no norm and no
square root.

With a = (x·u) / (u·u) and b = (dy·u) / (u·u) of every token and block, 0 where u is 0, and c = 2
(with v: c = 1):

    x' = x − c a u [+ a_v v]                  g = Σ_t a dy + b x
    dx = dy − c b u [+ b_v v]             du = −c (g − (g·u) / (u·u) u)
                                          dv = g_v − (g_v·v) / (v·v) v

A program has a block of a few tokens. What it reads a second time comes from the cache: x in
reflect, and for blocks above WHOLE features dy and x in the gradients.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.backends.triton.launch import launch, record, rows
from delora_kernels.backends.triton.tables import REGISTERS, cdiv, padded, splits

WHOLE = 4096
"""Features of the largest block whose sums a program holds in registers."""


class Tile(NamedTuple):
    """Tokens and features of a tile, warps."""

    tokens: int
    features: int
    warps: int


def tile_of(D: int) -> Tile:
    """Return the tile of a block of D features, for both directions: whole blocks, or chunks of
    blocks above WHOLE.
    """
    if D > WHOLE:
        return Tile(8, 256, 8)
    features = padded(D)
    tokens = min(32, WHOLE // features)
    return Tile(tokens, features, 4 if tokens * features <= 1024 else 8)


@triton.jit
def _over(dot, square):
    """dot / square, 0 where the square is 0: a vector of length 0 has no direction."""
    return tl.where(square == 0.0, 0.0, dot / tl.where(square == 0.0, 1.0, square))


@triton.jit
def _load(POINTER, t, c, stride, inside):
    return tl.load(POINTER + t[:, None] * stride + c[None, :], inside, 0.0).to(tl.float32)


@triton.jit(do_not_specialize=["T"])
def reflect_kernel(
    X, U, V, BIAS, OUT, T, C, D, n, stride_x,
    WITH_V: tl.constexpr, WITH_BIAS: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Block i of BT tokens, read twice: the second time from the cache."""
    i = tl.program_id(0) % n
    t = (tl.program_id(0) // n).to(tl.int64) * BT + tl.arange(0, BT)
    xu = tl.zeros((BT, BD), tl.float32)
    xv = tl.zeros((BT, BD), tl.float32)
    uu = tl.zeros((BD,), tl.float32)
    vv = tl.zeros((BD,), tl.float32)
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        c = i * D + d
        x = _load(X, t, c, stride_x, (t[:, None] < T) & (d[None, :] < D))
        u = tl.load(U + c, d < D, 0.0).to(tl.float32)
        xu += x * u[None, :]
        uu += u * u
        if WITH_V:
            v = tl.load(V + c, d < D, 0.0).to(tl.float32)
            xv += x * v[None, :]
            vv += v * v
    a_u = _over(tl.sum(xu, 1), tl.sum(uu, 0))
    a_v = _over(tl.sum(xv, 1), tl.sum(vv, 0))
    for d0 in range(0, D, BD):
        d = d0 + tl.arange(0, BD)
        c = i * D + d
        inside = (t[:, None] < T) & (d[None, :] < D)
        out = _load(X, t, c, stride_x, inside)
        u = tl.load(U + c, d < D, 0.0).to(tl.float32)
        if WITH_V:
            v = tl.load(V + c, d < D, 0.0).to(tl.float32)
            out += a_v[:, None] * v[None, :] - a_u[:, None] * u[None, :]
        else:
            out -= 2.0 * a_u[:, None] * u[None, :]
        if WITH_BIAS:
            out += tl.load(BIAS + c, d < D, 0.0).to(tl.float32)[None, :]
        tl.store(OUT + t[:, None] * C + c[None, :], out.to(OUT.dtype.element_ty), inside)


@triton.jit(do_not_specialize=["T", "part"])
def reflect_backward_kernel(
    DY, X, U, V, DX, PARTS, T, part, C, D, n, stride_dy, stride_x,
    WITH_V: tl.constexpr, WITH_DX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Whole block i of `part` tokens: dx, and the sums g_u and g_v of this part, [parts, 1 or 2,
    C].
    """
    i = tl.program_id(0) % n
    which = (tl.program_id(0) // n).to(tl.int64)
    d = tl.arange(0, BD)
    c = i * D + d
    u = tl.load(U + c, d < D, 0.0).to(tl.float32)
    uu = tl.sum(u * u, 0)
    if WITH_V:
        v = tl.load(V + c, d < D, 0.0).to(tl.float32)
        vv = tl.sum(v * v, 0)
    g_u = tl.zeros((BT, BD), tl.float32)
    g_v = tl.zeros((BT, BD), tl.float32)
    for t0 in range(which * part, tl.minimum(which * part + part, T), BT):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        inside = (t[:, None] < T) & (d[None, :] < D)
        x = _load(X, t, c, stride_x, inside)
        dy = _load(DY, t, c, stride_dy, inside)
        a_u = _over(tl.sum(x * u[None, :], 1), uu)
        b_u = _over(tl.sum(dy * u[None, :], 1), uu)
        g_u += a_u[:, None] * dy + b_u[:, None] * x
        if WITH_V:
            a_v = _over(tl.sum(x * v[None, :], 1), vv)
            b_v = _over(tl.sum(dy * v[None, :], 1), vv)
            g_v += a_v[:, None] * dy + b_v[:, None] * x
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
def reflect_backward_chunked_kernel(
    DY, X, U, V, DX, PARTS, T, part, C, D, n, stride_dy, stride_x,
    WITH_V: tl.constexpr, WITH_DX: tl.constexpr, BT: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Do the same for a block that a program can't hold: PARTS starts at 0, and this program alone
    adds to its part.
    """
    i = tl.program_id(0) % n
    which = (tl.program_id(0) // n).to(tl.int64)
    own = PARTS + which * (2 if WITH_V else 1) * C
    for t0 in range(which * part, tl.minimum(which * part + part, T), BT):
        t = t0 + tl.arange(0, BT).to(tl.int64)
        xu = tl.zeros((BT,), tl.float32)
        yu = tl.zeros((BT,), tl.float32)
        xv = tl.zeros((BT,), tl.float32)
        yv = tl.zeros((BT,), tl.float32)
        uu = tl.zeros((BD,), tl.float32)
        vv = tl.zeros((BD,), tl.float32)
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            c = i * D + d
            inside = (t[:, None] < T) & (d[None, :] < D)
            x = _load(X, t, c, stride_x, inside)
            dy = _load(DY, t, c, stride_dy, inside)
            u = tl.load(U + c, d < D, 0.0).to(tl.float32)
            xu += tl.sum(x * u[None, :], 1)
            yu += tl.sum(dy * u[None, :], 1)
            uu += u * u
            if WITH_V:
                v = tl.load(V + c, d < D, 0.0).to(tl.float32)
                xv += tl.sum(x * v[None, :], 1)
                yv += tl.sum(dy * v[None, :], 1)
                vv += v * v
        a_u = _over(xu, tl.sum(uu, 0))
        b_u = _over(yu, tl.sum(uu, 0))
        if WITH_V:
            a_v = _over(xv, tl.sum(vv, 0))
            b_v = _over(yv, tl.sum(vv, 0))
        for d0 in range(0, D, BD):
            d = d0 + tl.arange(0, BD)
            c = i * D + d
            inside = (t[:, None] < T) & (d[None, :] < D)
            x = _load(X, t, c, stride_x, inside)
            dy = _load(DY, t, c, stride_dy, inside)
            u = tl.load(U + c, d < D, 0.0).to(tl.float32)
            sums = tl.load(own + c, d < D, 0.0) + tl.sum(a_u[:, None] * dy + b_u[:, None] * x, 0)
            tl.store(own + c, sums, d < D)
            dx = dy - (1.0 if WITH_V else 2.0) * b_u[:, None] * u[None, :]
            if WITH_V:
                v = tl.load(V + c, d < D, 0.0).to(tl.float32)
                sums = tl.load(own + C + c, d < D, 0.0) + tl.sum(a_v[:, None] * dy + b_v[:, None] * x, 0)
                tl.store(own + C + c, sums, d < D)
                dx += b_v[:, None] * v[None, :]
            if WITH_DX:
                tl.store(DX + t[:, None] * C + c[None, :], dx.to(DX.dtype.element_ty), inside)
        tl.debug_barrier()  # the next tokens read what these have added


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
    (T, C), (n, D) = x.shape, u.shape
    x, u, v = rows(x), u.contiguous(), None if v is None else v.contiguous()
    bias = None if bias is None else bias.contiguous()
    out = x.new_empty((T, C))
    if T * C == 0:
        return out
    tile = tile_of(D)
    made = record(
        reflect_kernel, (C, D, n, x.stride(0)),
        WITH_V=v is not None, WITH_BIAS=bias is not None, BT=tile.tokens, BD=tile.features, num_warps=tile.warps,
    )  # fmt: skip
    launch(made, (n * cdiv(T, tile.tokens),), (x, u, v, bias, out), (T,))
    return out


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
    tile = tile_of(D)
    steps = cdiv(T, tile.tokens)
    part = cdiv(steps, splits(n, steps)) * tile.tokens
    count = cdiv(T, part)
    whole = D <= WHOLE
    parts = (du.new_empty if whole else du.new_zeros)((count, m, C))
    kernel = reflect_backward_kernel if whole else reflect_backward_chunked_kernel
    made = record(
        kernel, (C, D, n, dy.stride(0), x.stride(0)), WITH_V=v is not None, WITH_DX=need_dx,
        BT=tile.tokens, BD=tile.features, num_warps=tile.warps, maxnreg=REGISTERS,
    )  # fmt: skip
    launch(made, (n * count,), (dy, x, u, v, dx, parts), (T, part))
    sums = add_parts(parts, torch.float32)
    across = record(across_kernel, (C, D, n), WITH_V=v is not None, BD=min(1024, tile.features))
    launch(across, (n * m,), (sums, u, v, du, dv))
    return dx, du, dv
