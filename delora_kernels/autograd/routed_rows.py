"""Rows of tokens in the order of their experts, back at their tokens: sums over each token's rows,
weighted and not.

T tokens that go to k experts each make S = T k rows. `order` [S] lists the places (token · k +
choice) by expert, `places` [S] is its inverse: where the row of each place stands. No row is added
to another's memory, so results repeat bit for bit on every device.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

_SUMMED_IN_ONE_PASS = (torch.float32, torch.float64)


class WeightedRows(torch.autograd.Function):
    """y [S, H] by expert, weights w [T, k], order, places → Σ_j w[t, j] · y[places[t, j]] [T, H],
    in the wider dtype of the two.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, weights: Tensor, order: Tensor, places: Tensor) -> Tensor:
        need_y, need_weights, *_ = ctx.needs_input_grad
        ctx.dtypes, ctx.k = (y.dtype, weights.dtype), weights.shape[1]
        ctx.save_for_backward(y if need_weights else None, weights if need_y else None, order, places)
        places = places.view(weights.shape)
        if y.dtype == weights.dtype and y.dtype in _SUMMED_IN_ONE_PASS:
            return embedding_bag(places, y, mode="sum", per_sample_weights=weights)
        rows = y.index_select(0, places.flatten()).view(*weights.shape, y.shape[1])
        return (rows * weights[:, :, None]).sum(1)

    @staticmethod
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        y, weights, order, places = ctx.saved_tensors
        (y_dtype, weights_dtype), k = ctx.dtypes, ctx.k
        rows = dout.index_select(0, order // k)
        dy = dweights = None
        if y is not None:
            dots = torch.bmm(rows[:, None], y.to(rows.dtype)[:, :, None]).flatten()
            dweights = dots[places].view(-1, k).to(weights_dtype)
        if weights is not None:
            each = weights.reshape(-1)[order][:, None]
            dy = (rows * each if torch.is_grad_enabled() else rows.mul_(each)).to(y_dtype)
        return dy, dweights, None, None


def summed_rows(rows: Tensor, places: Tensor) -> Tensor:
    """Σ_j rows[places[t, j]] [T, H]: the gradient of tokens that were copied to these places."""
    if rows.dtype in _SUMMED_IN_ONE_PASS:
        return embedding_bag(places, rows, mode="sum")
    return rows.index_select(0, places.flatten()).view(*places.shape, rows.shape[1]).sum(1)
