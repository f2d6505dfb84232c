"""ETHER's and ETHER+'s block reflections and their gradients: one launch forward, three
backward.
"""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.kernels import add_parts
from delora_kernels.backends.cuda.launch import launch, rows, splits, tiles

COLUMNS = 1024
"""Of a step of `dk_reflect_backward`."""


def reflect(x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None) -> Tensor:
    """x reflected, + bias, [T, C]."""
    (T, C), (n, D), (u, v) = x.shape, u.shape, _vectors(x, u, v)
    out = x.new_empty((T, C))
    if T * C:
        launch("reflect", rows(x), u, v, bias, out, T, n, D)
    return out


def reflect_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx, du, dv: tokens are split among blocks, their sums added in their order, then made
    orthogonal to u and v.
    """
    (T, C), (n, D), m = x.shape, u.shape, 1 if v is None else 2
    dx = dy.new_empty((T, C) if need_dx else 0)
    du = u.new_empty((n, D), dtype=torch.float32)
    dv = du.new_empty(0 if v is None else (n, D))
    if T * C == 0:
        return dx, du.zero_(), dv.zero_()
    u, v = _vectors(x, u, v)
    parts = splits(-(-C // COLUMNS), tiles(T))
    sums = du.new_empty((parts, m, C))
    launch("reflect_backward", rows(dy), rows(x), u, v, dx if need_dx else None, sums, T, n, D, parts)
    launch("reflect_across", add_parts(sums, torch.float32), u, v, du, None if v is None else dv, n, D)
    return dx, du, dv


def _vectors(x: Tensor, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """u and v as the kernels take them: in one dtype, that of x or float32, with contiguous
    rows.
    """
    dtype = u.dtype if u.dtype == x.dtype and (v is None or v.dtype == u.dtype) else torch.float32
    return rows(u.to(dtype)), None if v is None else rows(v.to(dtype))
