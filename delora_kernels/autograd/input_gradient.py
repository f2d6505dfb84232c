"""dx of one linear, or of several of one x, and dÂ: Σ (dy ⊙ c) W + scale · dv Â.

One frozen W is dense at a time, of a base that gives it in parts one part.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from delora_kernels.autograd.function import is_batched
from delora_kernels.backends.eager.low_rank import scaled_pair
from delora_kernels.bases.plain import dense
from delora_kernels.bases.stored import Parts
from delora_kernels.op_arguments import Branch, Frozen, Masks


def input_gradient(
    stages: Any,
    dys: Sequence[Tensor],
    weights: Sequence[Any],
    dtype: torch.dtype,
    branch: Branch,
    masks: Masks,
    c: Tensor | None = None,
    two_term: bool = False,
) -> tuple[Tensor, Tensor]:
    """dx [T, K] and dÂ, each empty where `branch` or no weights say that it is not wanted.

    Args:
        stages: The ops that run it.
        dys, weights: dy [T, N] and W, a tensor or a stored base, of each linear; no weights: dx is
            not wanted.
        dtype: Of W.
        branch, masks: Their low-rank branch.
        c, two_term: Of one DoRA: as `Frozen` says.
    """
    if not weights:
        return stages.input_backward(dys[0], Frozen(None, c, two_term), branch, masks)
    batched = not torch.compiler.is_compiling() and any(map(is_batched, dys))
    whole = two_term or batched or torch.compiler.is_compiling()
    (dy, rows, make), *others = [
        (dy if rows is None else dy[:, rows], rows, make)
        for dy, weight in zip(dys, weights, strict=True)
        for rows, make in _parts(weight, dtype, whole)
    ]
    dx, dA_hat = stages.input_backward(dy, Frozen(make(), _of(c, rows), two_term), branch, masks)
    for dy, rows, make in others:
        left, right = scaled_pair(dy, make(), _of(c, rows))
        dx = torch.addmm(dx, left, right) if batched else dx.addmm_(left, right)
        del left, right  # a dense W, before the next is made
    return dx, dA_hat


def _parts(weight: Any, dtype: torch.dtype, whole: bool) -> Parts:
    if whole or isinstance(weight, Tensor):
        return [(None, partial(dense, weight, dtype))]
    found: Parts = weight.dense_parts(dtype)
    return found


def _of(c: Tensor | None, rows: slice | None) -> Tensor | None:
    return c if c is None or rows is None else c[rows]
