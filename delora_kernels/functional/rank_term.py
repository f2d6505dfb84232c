"""add_rank_term: a low-rank term on the output of a base that runs its own forward."""

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from delora_kernels.autograd import function
from delora_kernels.autograd.rank_term import BesideBase
from delora_kernels.call import Options, TermCall
from delora_kernels.checks import PLAIN
from delora_kernels.functional.common import as_rows, dtypes, exporting, seeds

_NAME = "lora_linear"
"""Whose second derivatives are refused."""


def add_rank_term(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    *,
    ranks: tuple[int, ...] = (),
    dropout_p: tuple[float, ...] = (0.0,),
) -> Tensor:
    """Add y + scale · drop(x) Aᵀ Bᵀ out of place, rounded once, differentiable once.

    Args:
        y: The base's output, `[..., N]`; gets its gradient as it comes.
        x: The base's input, `[..., K]`.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: Factor of the term.
        ranks: Ranks of the adapters stacked in A and B, each with its own dropout mask; (): one.
        dropout_p: Of each of them, the probability of dropping an element of its input.

    Returns:
        `[..., N]` in y's dtype; under autocast in the wider one of y's and autocast's.
    """
    compute_dtype, rank_dtype = dtypes(x, x, A, B)
    if torch.is_autocast_enabled(x.device.type):
        y = y.to(torch.promote_types(y.dtype, rank_dtype))
    if exporting() or type(y) not in PLAIN or y.device != x.device or y.shape != (*x.shape[:-1], B.shape[0]):
        return _eagerly(y, x, A, B, scale, ranks or (A.shape[0],), dropout_p, rank_dtype)
    seed = seeds(_NAME, None, x, len(ranks)) if any(dropout_p) else None
    options = Options(_NAME, scale, 0.0, ranks, dropout_p, False, False, 0, compute_dtype, rank_dtype)
    call = TermCall(as_rows(x), as_rows(y), A, B, seed, options)
    return function.run(BesideBase, call, "eager", x.shape)[0]


def _eagerly(
    y: Tensor,
    x: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float,
    ranks: tuple[int, ...],
    dropout_p: tuple[float, ...],
    dtype: torch.dtype,
) -> Tensor:
    """In plain torch: where a program is exported, or y is no plain tensor."""
    total, start = y, 0
    for r, p in zip(ranks, dropout_p, strict=True):
        part = slice(start, start := start + r)
        h = linear(dropout(x.to(dtype), p) if p else x.to(dtype), A[part].to(dtype))
        total = total + (linear(h, B[:, part].to(dtype)) * scale).to(y.dtype)
    return total
