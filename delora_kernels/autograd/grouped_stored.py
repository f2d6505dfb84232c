"""The ops of an expert model's linears on weights that are stored in few bits: group by group of
experts, as many as a budget holds dense at a time, forward and backward alike.

    for experts, rows in weight.groups(offsets):   y[rows] = op(x[rows], dense(experts), ...)

The dense experts of a group are gone before the next ones are made, and none is kept for backward.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from delora_kernels.bases.stored_experts import StoredExperts
from delora_kernels.dtypes import accumulate_dtype


def grouped_linear(
    stages: Any,
    x: Tensor,
    weight: Tensor | StoredExperts,
    bias: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Run `ops.grouped_linear`, where the weight is stored by groups of experts."""
    if isinstance(weight, Tensor):
        y, h = stages.grouped_linear(x, weight, bias, offsets, A_hat, B_hat, scale, dropout_p, seed)
        return y, h
    if dropout_p > 0.0:  # a mask counts rows: by groups it would be another one than without
        raise NotImplementedError("grouped_linear: experts that are stored in few bits take no dropout")
    y = x.new_zeros((x.shape[0], weight.shape[1]))
    h = x.new_empty(0) if A_hat is None else A_hat.new_zeros((x.shape[0], A_hat.shape[1]))
    for first, last, rows in weight.groups(offsets, x.shape[0], x.dtype):
        A_e, B_e, bias_e = (None if each is None else each[first:last] for each in (A_hat, B_hat, bias))
        ends = offsets[first:last] - rows.start
        y_e, h_e = stages.grouped_linear(
            x[rows], weight.dense(first, last, x.dtype), bias_e, ends, A_e, B_e, scale, 0.0, None
        )  # nobody holds the dense experts from here on
        y[rows] = y_e
        if A_hat is not None:
            h[rows] = h_e
    return y, h


def grouped_backward(
    stages: Any,
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | StoredExperts | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    need_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Run `ops.grouped_backward`, where the weight is stored and dx is wanted by groups."""
    if weight is None or isinstance(weight, Tensor):
        arguments = (dy, x, h, weight, offsets, A_hat, B_hat, scale, need_bias, dropout_p, seed)
        dx, dA, dB, dbias = stages.grouped_backward(*arguments)
        return dx, dA, dB, dbias
    (E, N, K), acc = weight.shape, accumulate_dtype(dy.dtype)
    dx = dy.new_zeros((dy.shape[0], K))
    dA, dB = (dy.new_empty(0, dtype=acc) for _ in range(2))
    if x is not None and B_hat is not None:
        dA = B_hat.new_zeros((E, B_hat.shape[2], K), dtype=accumulate_dtype(B_hat.dtype))
    if h is not None:
        dB = h.new_zeros((E, N, h.shape[1]), dtype=accumulate_dtype(h.dtype))
    dbias = dy.new_zeros((E if need_bias else 0, N), dtype=acc)
    for first, last, rows in weight.groups(offsets, dy.shape[0], dy.dtype):
        x_e, h_e = (None if each is None else each[rows] for each in (x, h))
        A_e, B_e = (None if each is None else each[first:last] for each in (A_hat, B_hat))
        dense, ends = weight.dense(first, last, dy.dtype), offsets[first:last] - rows.start
        dropout = dropout_p, seed
        found = stages.grouped_backward(dy[rows], x_e, h_e, dense, ends, A_e, B_e, scale, need_bias, *dropout)
        del dense
        dx[rows] = found[0]
        for whole, part in zip((dA, dB, dbias), found[1:], strict=True):
            if whole.numel() > 0:
                whole[first:last] = part
    return dx, dA, dB, dbias


def each_dense(weight: Tensor | StoredExperts, dtype: torch.dtype) -> Iterator[Tensor]:
    """Yield the weight of one expert after the other, in `dtype`."""
    for e in range(weight.shape[0]):
        yield weight[e].to(dtype) if isinstance(weight, Tensor) else weight.dense(e, e + 1, dtype)[0]
