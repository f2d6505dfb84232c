"""The linears of an expert model in plain torch: a loop over the experts that have rows, or where
the device has one, the library's grouped GEMM.

On a CPU the loop is no slower than the grouped GEMM (which is a loop there too), takes every dtype
and size, and does all that is to be done with an expert's rows while they are in cache. On other
devices it would wait for the offsets; there it is for what the grouped GEMM does not take.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
from torch import Tensor

from delora_kernels.backends.dropout import KeepMask
from delora_kernels.backends.eager import grouped_library as library
from delora_kernels.backends.eager.low_rank import add_rank_term, factor_grad, rank_gradients
from delora_kernels.backends.eager.thin_products import product
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import TermGradients


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """For each expert the frozen GEMM, and its rank-r term on top."""
    mask, scale = _mask(x.shape[1], dropout_p, seed), scale / (1 - dropout_p)
    if library.takes(x, (weight, A_hat, B_hat), weight.shape[1:]):
        return library.forward(x, weight, bias, offsets, A_hat, B_hat, scale, mask)
    y = x.new_empty((x.shape[0], weight.shape[1]))
    h = x.new_empty(0) if A_hat is None else A_hat.new_empty((x.shape[0], A_hat.shape[1]))
    sizes, Wt = rows_of_experts(offsets, x.shape[0]), _matrices(weight, x.dtype, True)
    each_x, each_y = x.split_with_sizes(sizes), y.split_with_sizes(sizes)
    each_h, each_At, each_Bt = _split(None if A_hat is None else h, sizes), _each(A_hat, True), _each(B_hat, True)
    add, first, cast = _adding(h, y), 0, h.dtype != x.dtype
    for e, (size, x_e, y_e) in enumerate(zip(sizes[:-1], each_x, each_y, strict=False)):
        if size == 0:
            continue
        if A_hat is not None:  # before W pushes x out of cache
            seen = x_e if mask is None else mask.drop(x_e, slice(first, first + size))
            each_h[e].addmm_(seen.to(h.dtype) if cast else seen, each_At[e], beta=0, alpha=scale)
        if bias is None:
            torch.mm(x_e, Wt(e), out=y_e)
        else:
            torch.addmm(bias[e].to(x.dtype), x_e, Wt(e), out=y_e)
        if A_hat is not None and B_hat is not None:
            add(y_e, each_h[e], each_Bt[e])
        first += size
    y[first:] = 0
    if A_hat is not None:
        h[first:] = 0
    return y, h


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    need_bias: bool,
    dropout_p: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Everything of one expert after the other; rank-r products while its dy is in cache."""
    widths = [dy.shape[1], *(each.shape[-1] for each in (weight, x) if each is not None)]
    inverse = 1 / (1 - dropout_p)
    mask = None if seed is None else _mask(widths[-1], dropout_p, seed)
    if library.takes(dy, (weight, x, h, A_hat, B_hat), widths):
        return library.backward(dy, x, h, weight, offsets, A_hat, B_hat, scale, need_bias, mask, inverse)
    acc, (T, N), E = accumulate_dtype(dy.dtype), dy.shape, len(offsets)
    sizes = rows_of_experts(offsets, T)
    dx = dy.new_empty(0 if weight is None else (T, weight.shape[2]))
    dA, dBt = (dy.new_empty(0, dtype=acc) for _ in range(2))
    if x is not None and B_hat is not None:
        dA = B_hat.new_zeros((E, B_hat.shape[2], x.shape[1]), dtype=accumulate_dtype(B_hat.dtype))
    if h is not None:
        dBt = h.new_zeros((E, h.shape[1], N), dtype=accumulate_dtype(h.dtype))
    dbias = dy.new_zeros((E if need_bias else 0, N), dtype=acc)
    wants_dv = B_hat is not None and (A_hat is not None or x is not None)
    dv = None if not wants_dv or B_hat is None else B_hat.new_empty((T, B_hat.shape[2]))
    W = None if weight is None else _matrices(weight, dy.dtype)
    each_x, each_dv, each_dx = _split(x, sizes), _split(dv, sizes), _split(None if weight is None else dx, sizes)
    each_ht, each_dvt = (_split(None if each is None else each.t(), sizes, 1) for each in (h, dv))
    each_A, each_B, each_dA, each_dBt = _each(A_hat), _each(B_hat), _each(dA), _each(dBt)
    add = _adding(dy if dv is None else dv, dx)
    first = 0
    for e, (size, dy_e) in enumerate(zip(sizes[:-1], dy.split_with_sizes(sizes), strict=False)):
        if size == 0:
            continue
        rows = slice(first, first + size)
        if need_bias:
            torch.sum(dy_e, 0, dtype=acc, out=dbias[e])
        if dv is not None:
            _dv(dy_e, each_B[e], scale, each_dv[e])
        if h is not None:
            _token_product(each_ht[e], dy_e, each_dBt[e])
        if dv is not None and x is not None:
            _token_product(each_dvt[e], each_x[e] if mask is None else mask.drop(each_x[e], rows), each_dA[e])
        if W is not None:
            dx_e = torch.mm(dy_e, W(e), out=each_dx[e])
            if dv is not None and A_hat is not None and mask is None:
                add(dx_e, each_dv[e], each_A[e])
            elif dv is not None and A_hat is not None and mask is not None:
                dx_e += mask.drop(product(each_dv[e], each_A[e], inverse), rows)
        first += size
    if weight is not None:
        dx[first:] = 0
    if mask is not None:
        dA *= inverse
    return dx, dA, (dBt.mT if h is not None else dBt), dbias


def _mask(K: int, dropout_p: float, seed: Tensor | None) -> KeepMask | None:
    return None if seed is None else KeepMask(K, dropout_p, seed)


def _dv(dy: Tensor, B: Tensor, scale: float, out: Tensor) -> None:
    """out = scale · dy B in B's dtype."""
    if B.dtype == dy.dtype:
        out.addmm_(dy, B, beta=0, alpha=scale)
    else:
        torch.mul(rank_gradients(dy, TermGradients(None, B, 1.0), None)[0], scale, out=out)


def _token_product(left: Tensor, tokens: Tensor, out: Tensor) -> None:
    """out = left tokens, left [R, T]: one GEMM into its place, or where dtypes differ, in chunks of
    rows.
    """
    if left.dtype == tokens.dtype == out.dtype:
        torch.mm(left, tokens, out=out)
    else:
        out.copy_(factor_grad(left.t(), tokens, 1.0))


def _adding(left: Tensor, out: Tensor) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """(out, left, right) → out += left right."""
    return Tensor.addmm_ if left.dtype == out.dtype else partial(add_rank_term, scale=1.0)


def grouped_weight_grad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """One GEMM for each expert that has rows."""
    if library.takes(dy, (x,), (dy.shape[1], x.shape[1])):
        return library.weight_grad(dy, x, offsets)
    dW, sizes = dy.new_zeros((len(offsets), dy.shape[1], x.shape[1])), rows_of_experts(offsets, len(dy))
    for dy_e, x_e, out in zip(dy.split_with_sizes(sizes), x.split_with_sizes(sizes), dW.unbind(0), strict=False):
        if len(x_e) > 0:
            torch.mm(dy_e.t(), x_e, out=out)
    return dW


def grouped_gemm(x: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """x_e right_e, [T, C] [E, C, D] → [T, D]; rows behind the last offset stay unwritten."""
    if library.takes(x, (right,), right.shape[1:]):
        return library.gemm(x, right, offsets)
    y, sizes = x.new_empty((x.shape[0], right.shape[2])), rows_of_experts(offsets, len(x))
    right_of = _matrices(right, x.dtype)
    for e, (x_e, y_e) in enumerate(zip(x.split_with_sizes(sizes)[:-1], y.split_with_sizes(sizes), strict=False)):
        if len(x_e) > 0:
            torch.mm(x_e, right_of(e), out=y_e)
    return y


def rows_of_experts(offsets: Tensor, T: int) -> list[int]:
    """How many of T rows each expert has, and how many are nobody's, [E + 1]: for `Tensor.split`,
    which makes the views of all experts at once (an index for each costs more than its thin GEMM).
    """
    ends = [0, *offsets.tolist(), T]
    sizes = [end - begin for begin, end in pairwise(ends)]
    if min(sizes) < 0:
        raise ValueError(f"offsets must not fall and end at most at x's {T} rows, got {ends[1:-1]}")
    return sizes


def _matrices(weight: Tensor, dtype: torch.dtype, transposed: bool = False) -> Callable[[int], Tensor]:
    """Expert → its matrix in `dtype`; those of a dense weight are all made at once, of others only
    those that are asked for.
    """
    if weight.dtype == dtype and type(weight) in (Tensor, torch.nn.Parameter):
        return _each(weight, transposed).__getitem__
    return lambda e: weight[e].to(dtype).t() if transposed else weight[e].to(dtype)


def _split(rows: Tensor | None, sizes: list[int], dim: int = 0) -> Sequence[Tensor]:
    return () if rows is None else rows.split_with_sizes(sizes, dim)


def _each(factor: Tensor | None, transposed: bool = False) -> Sequence[Tensor]:
    return () if factor is None else (factor.mT if transposed else factor).unbind(0)
