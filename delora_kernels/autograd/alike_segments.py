"""Segments of a mixed batch that are alike, one for each adapter: S products of L rows as one.

H = X Aᵀ,   Y += scale · H Bᵀ        X [S, L, K], H [S, L, r], A [S, r, K], B [S, N, r]
dV = dY B,   dX += scale · dV A,   dA = scale · dVᵀ X,   dB = scale · dYᵀ H
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.call import MixedOptions


def are_alike(o: MixedOptions) -> bool:
    """Whether each adapter has one segment, and these are of one length, rank and scale, in the
    dtype of the base.
    """
    if len(o.lengths) < 2 or o.adapters != tuple(range(len(o.lengths))) or o.rank_dtype != o.compute_dtype:
        return False
    return len(set(o.lengths)) == len(set(o.ranks)) == len(set(o.scales)) == 1


def write_terms(tokens: Tensor, A: Tensor, B: Tensor, out: Tensor, add: bool, o: MixedOptions) -> Tensor:
    """Write the terms of all rows, or with `add` add them, and return h [S · L · r].

    Args:
        tokens, out: [S · L, K], [S · L, N].
        A, B: [S · r, K], [S · N · r], as the call has them.
    """
    h = torch.bmm(_rows_of_each(tokens, o), _A_of_each(A, o).transpose(1, 2))
    term = _B_of_each(B, o).transpose(1, 2)
    _rows_of_each(out, o).baddbmm_(h, term, beta=int(add), alpha=o.scales[0])
    return h.view(-1)


def gradients_of_terms(need: Any, saved: Any, tokens: Any, dy: Tensor, dx: Tensor | None, o: MixedOptions) -> Any:
    """Return the gradients of A and B as the call has them, and write the terms of dx.

    Args:
        need: Whose gradient is wanted.
        saved: Of what is kept h, A and B; None where no wanted gradient needs them.
        tokens: [S · L, K] likewise.
        dy: [S · L, N].
        dx: [S · L, K], in which nothing stands yet; None: not wanted.
    """
    dy, scale, grad = _rows_of_each(dy, o), o.scales[0], {}
    if need.B:
        h = saved.h.view(*dy.shape[:2], o.ranks[0])
        grad["B"] = _product(h.transpose(1, 2), dy, scale).transpose(1, 2).reshape(-1)
    if need.A or dx is not None:
        dv = torch.bmm(dy, _B_of_each(saved.B, o))
        if need.A:
            grad["A"] = _product(dv.transpose(1, 2), _rows_of_each(tokens, o), scale).flatten(0, 1)
        if dx is not None:
            _rows_of_each(dx, o).baddbmm_(dv, _A_of_each(saved.A, o), beta=0, alpha=scale)
    return grad


def _rows_of_each(tokens: Tensor, o: MixedOptions) -> Tensor:
    return tokens.unflatten(0, (len(o.lengths), o.lengths[0]))


def _A_of_each(A: Tensor, o: MixedOptions) -> Tensor:
    return A.view(len(o.ranks), o.ranks[0], A.shape[1])


def _B_of_each(B: Tensor, o: MixedOptions) -> Tensor:
    return B.view(len(o.ranks), B.shape[0] // sum(o.ranks), o.ranks[0])


def _product(left: Tensor, right: Tensor, scale: float) -> Tensor:
    """scale · left right of each segment."""
    out = left.new_empty((left.shape[0], left.shape[1], right.shape[2]))
    return out.baddbmm_(left, right, beta=0, alpha=scale)
