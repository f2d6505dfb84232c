"""Products of a large matrix with few columns, R of them: in which form a GEMM takes them.

    dy B [T, R]        dyᵀ h [N, R]

Of the forms that compute the same, a CPU's library is several times slower in those in which the
few columns lie side by side: in B, or in the result.
"""

import torch
from torch import Tensor


def product(left: Tensor, right: Tensor, scale: float, like: Tensor | None = None) -> Tensor:
    """scale · left right, rounded once; `like` is any tensor of its shape and dtype, which is not
    read: with it, one call of torch less.
    """
    if scale == 1:
        return torch.mm(left, right)
    if like is not None:
        return torch.addmm(like, left, right, beta=0, alpha=scale)
    return left.new_empty((left.shape[0], right.shape[1])).addmm_(left, right, beta=0, alpha=scale)


def token_product(dy: Tensor, h: Tensor, scale: float, like: Tensor | None = None) -> Tensor:
    """scale · dyᵀ h [N, R]: as it stands where that is no slower, else transposed and copied.

    `like`: see `product`.
    """
    if (dy.shape[1] <= _WIDE or dy.shape[0] <= _FEW) and not is_thin(dy, h):
        return product(dy.t(), h, scale, like)
    return product(h.t(), dy, scale, None if like is None else like.t()).t().contiguous()


_WIDE, _FEW = 1024, 64
"""Columns and rows of dy beyond which a GEMM with few columns of its own takes longer than its
transpose and a copy.
"""


def is_thin(dy: Tensor, factor: Tensor) -> bool:
    """Whether a CPU's GEMM of dy [T, N] with the columns of a factor takes several times as long as
    with rows in their place: they fill no panel of its own (measured with MKL), and dy is large
    enough for that to show.
    """
    few = factor.shape[1] < _PANEL and dy.shape[0] * dy.shape[1] >= _LARGE
    return few and factor.is_cpu and factor.dtype in (torch.float32, torch.float64)


_PANEL, _LARGE = 16, 1 << 16


def by_columns(B: Tensor, dy: Tensor) -> Tensor:
    """Return B [N, R] as a product dy B takes it fastest: where it is thin, each column in one
    piece.
    """
    return B.t().contiguous().t() if is_thin(dy, B) else B
