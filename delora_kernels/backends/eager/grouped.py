"""The linears of an expert model in plain torch: a loop over the experts that have rows, or where
the device has one, the library's grouped GEMM.

On a CPU the loop is no slower than the grouped GEMM (which is a loop there too), takes every dtype
and size, and does all that is to be done with an expert's rows while they are in cache. On other
devices it would wait for the offsets; there it is for what the grouped GEMM does not take.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from delora_kernels.backends.dropout import KeepMask
from delora_kernels.backends.eager import grouped_library as library
from delora_kernels.backends.eager.low_rank import add_rank_term, factor_grad, product, rank_gradients
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
    end = 0
    for e, rows in _experts(offsets, x.shape[0]):
        x_e, y_e, W_e, end = x[rows], y[rows], weight[e].to(x.dtype), rows.stop
        h_e = None
        if A_hat is not None:  # before W pushes x out of cache
            h_e, A_e = h[rows], A_hat[e].t()
            seen = x_e if mask is None else mask.drop(x_e, rows)
            torch.addmm(h_e, seen.to(h.dtype), A_e, beta=0, alpha=scale, out=h_e)
        if bias is None:
            torch.mm(x_e, W_e.t(), out=y_e)
        else:
            torch.addmm(bias[e].to(x.dtype), x_e, W_e.t(), out=y_e)
        if h_e is not None and B_hat is not None:
            add_rank_term(y_e, h_e, B_hat[e].t(), 1.0)
    y[end:] = 0
    if A_hat is not None:
        h[end:] = 0
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
    dx = dy.new_empty(0 if weight is None else (T, weight.shape[2]))
    dA, dBt = (dy.new_empty(0, dtype=acc) for _ in range(2))
    if x is not None and B_hat is not None:
        dA = B_hat.new_zeros((E, B_hat.shape[2], x.shape[1]), dtype=accumulate_dtype(B_hat.dtype))
    if h is not None:
        dBt = h.new_zeros((E, h.shape[1], N), dtype=accumulate_dtype(h.dtype))
    dbias = dy.new_zeros((E if need_bias else 0, N), dtype=acc)
    end = 0
    for e, rows in _experts(offsets, T):
        dy_e, end = dy[rows], rows.stop
        if need_bias:
            torch.sum(dy_e, 0, dtype=acc, out=dbias[e])
        dv = None
        if B_hat is not None and (A_hat is not None or x is not None):
            dv = _dv(dy_e, B_hat[e], scale)
        if dBt.numel() > 0 and h is not None:
            _token_product(h[rows], dy_e, dBt[e])
        if dv is not None and x is not None:
            _token_product(dv, x[rows] if mask is None else mask.drop(x[rows], rows), dA[e])
        if weight is not None:
            dx_e = torch.mm(dy_e, weight[e].to(dy.dtype), out=dx[rows])
            if dv is not None and A_hat is not None and mask is None:
                add_rank_term(dx_e, dv, A_hat[e], 1.0)
            elif dv is not None and A_hat is not None and mask is not None:
                dx_e += mask.drop(product(dv, A_hat[e], inverse), rows)
    if weight is not None:
        dx[end:] = 0
    if mask is not None:
        dA *= inverse
    return dx, dA, (dBt.mT if h is not None else dBt), dbias


def _mask(K: int, dropout_p: float, seed: Tensor | None) -> KeepMask | None:
    return None if seed is None else KeepMask(K, dropout_p, seed)


def _dv(dy: Tensor, B: Tensor, scale: float) -> Tensor:
    """scale · dy B in B's dtype."""
    if B.dtype == dy.dtype:
        return product(dy, B, scale)
    return rank_gradients(dy, TermGradients(None, B, 1.0), None)[0].mul_(scale)


def _token_product(left: Tensor, tokens: Tensor, out: Tensor) -> None:
    """out = leftᵀ tokens: one GEMM into its place, or where dtypes differ, in chunks of rows."""
    if left.dtype == tokens.dtype == out.dtype:
        torch.mm(left.t(), tokens, out=out)
    else:
        out.copy_(factor_grad(left, tokens, 1.0))


def grouped_weight_grad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """One GEMM for each expert that has rows."""
    if library.takes(dy, (x,), (dy.shape[1], x.shape[1])):
        return library.weight_grad(dy, x, offsets)
    dW = dy.new_zeros((len(offsets), dy.shape[1], x.shape[1]))
    for e, rows in _experts(offsets, len(dy)):
        torch.mm(dy[rows].t(), x[rows], out=dW[e])
    return dW


def grouped_gemm(x: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """x_e right_e, [T, C] [E, C, D] → [T, D]; rows behind the last offset stay unwritten."""
    if library.takes(x, (right,), right.shape[1:]):
        return library.gemm(x, right, offsets)
    y = x.new_empty((x.shape[0], right.shape[2]))
    for e, rows in _experts(offsets, len(x)):
        torch.mm(x[rows], right[e].to(x.dtype), out=y[rows])
    return y


def _experts(offsets: Tensor, T: int) -> Iterator[tuple[int, slice]]:
    """Every expert that has rows, and which."""
    begin = 0
    for e, end in enumerate(offsets.tolist()):
        if not begin <= end <= T:
            raise ValueError(f"offsets must not fall and end at most at x's {T} rows, got {offsets.tolist()}")
        if begin < end:
            yield e, slice(begin, end)
        begin = end
