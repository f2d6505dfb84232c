"""The autograd Function of a batch whose samples have LoRA adapters of their own:

    y_t = x_t Wᵀ + scale_i · x_t A_iᵀ B_iᵀ + bias,   i the adapter of row t

One frozen GEMM for all rows; then each segment, rows of one adapter, gets its term in place. Kept
are x, h [T, max rᵢ] and the caller's own tensors.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.autograd.function import Computed, differentiable, is_batched
from delora_kernels.backends.eager.low_rank import add_rank_term, factor_grad, project, rank_gradients
from delora_kernels.bases.plain import dense
from delora_kernels.call import MixedCall, MixedOptions
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import Masks, TermGradients

_NO_DROPOUT = Masks()


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    h: Tensor | None
    weight: Any
    A: Tensor | None
    B: Tensor | None
    order: Tensor | None


def _compute(call: MixedCall, x: Tensor, need: MixedCall, stages: Any) -> Computed:
    """Return y [T, N]."""
    o, tokens = call.options, _rows(x)
    y = linear(tokens, dense(call.weight, o.compute_dtype), None if call.bias is None else call.bias.to(tokens.dtype))
    A, B = _in_dtype(call.A, o.rank_dtype), _in_dtype(call.B, o.rank_dtype)
    h = A.new_empty((tokens.shape[0], max(o.ranks) if o.ranks else 0))
    seen, out = _taken(tokens, call.order), _taken(y, call.order)
    for rows, ranks, scale in o.segments:
        h_i = project(seen[rows], A[ranks], _NO_DROPOUT)
        add_rank_term(out[rows], h_i, B[:, ranks].t(), scale)
        if need.B:
            h[rows, : h_i.shape[1]] = h_i
    saved = _Saved(
        x=x if need.A or need.weight else None,
        h=h if need.B else None,
        weight=call.weight if need.x else None,
        A=call.A if need.x else None,
        B=call.B if need.x or need.A else None,
        order=call.order,
    )
    return Computed((_given_back(out, y, call.order),), saved, (call.A, call.B))


def _gradients(o: MixedOptions, need: MixedCall, saved: Any, stages: Any, dy: Tensor) -> dict[str, Any]:
    grad: dict[str, Any] = {"bias": torch.sum(dy, 0, dtype=accumulate_dtype(dy.dtype)) if need.bias else None}
    A, B = _in_dtype(saved.A, o.rank_dtype), _in_dtype(saved.B, o.rank_dtype)
    x: Any = None if saved.x is None else _rows(saved.x)
    if need.weight:
        grad["weight"] = torch.mm(dy.t(), x)
    if not torch.compiler.is_compiling() and is_batched(dy):
        return grad | _out_of_place(o, need, saved, x, A, B, dy)
    dx = torch.mm(dy, dense(saved.weight, o.compute_dtype)) if need.x else None
    R, wide = sum(o.ranks), accumulate_dtype(o.rank_dtype)
    dA = x.new_zeros((R, x.shape[1]), dtype=wide) if need.A else None
    dB = dy.new_zeros((dy.shape[1], R), dtype=wide) if need.B else None
    dy_s, x_s, dx_s = _taken(dy, saved.order), _taken(x, saved.order), _taken(dx, saved.order)
    for rows, ranks, scale in o.segments:
        h_i = None if dB is None else saved.h[rows, : ranks.stop - ranks.start]
        dv, dB_i = rank_gradients(dy_s[rows], TermGradients(h_i, None if B is None else B[:, ranks], scale), None)
        if dB is not None:
            dB[:, ranks] += dB_i
        if dA is not None:
            dA[ranks] += factor_grad(dv, x_s[rows], scale)
        if dx is not None:
            add_rank_term(dx_s[rows], dv, A[ranks], scale)
    return grad | {"A": dA, "B": dB, "x": None if dx is None else _given_back(dx_s, dx, saved.order)}


def _out_of_place(o: MixedOptions, need: MixedCall, saved: Any, x: Any, A: Any, B: Any, dy: Tensor) -> dict[str, Any]:
    """Return the same gradients of a batch of dy, which can't be summed into what is no batch."""
    wide, ends = accumulate_dtype(o.rank_dtype), [sum(o.ranks[: i + 1]) for i in range(len(o.ranks))]
    dA: list[Any] = [None] * len(ends)
    dB: list[Any] = [None] * len(ends)
    dx = torch.mm(dy, dense(saved.weight, o.compute_dtype)) if need.x else None
    dy_s, x_s = _taken(dy, saved.order), _taken(x, saved.order)
    for rows, ranks, scale in o.segments:
        i, dy_i = ends.index(ranks.stop), dy_s[rows].to(wide) * scale
        dv = None if B is None else torch.mm(dy_i, B[:, ranks].to(wide))
        if need.B:
            part = torch.mm(dy_i.t(), saved.h[rows, : ranks.stop - ranks.start].to(wide))
            dB[i] = part if dB[i] is None else dB[i] + part
        if need.A and dv is not None:
            part = torch.mm(dv.t(), x_s[rows].to(wide))
            dA[i] = part if dA[i] is None else dA[i] + part
        if dx is not None and dv is not None:
            places = torch.arange(len(dy), device=dy.device)[rows] if saved.order is None else saved.order[rows]
            dx = dx.index_add(0, places, torch.mm(dv, A[ranks].to(wide)).to(dx.dtype))
    return {"A": torch.cat(dA) if need.A else None, "B": torch.cat(dB, dim=1) if need.B else None, "x": dx}


def _in_dtype(factor: Tensor | None, dtype: torch.dtype) -> Any:
    return factor if factor is None or factor.dtype == dtype else factor.to(dtype)


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [T, K]."""
    return x if x.dim() == 2 else x.flatten(0, -2)


def _taken(tokens: Tensor | None, order: Tensor | None) -> Any:
    """Return the rows as the segments count them: themselves, or a copy in `order`."""
    return tokens if order is None or tokens is None else tokens.index_select(0, order)


def _given_back(taken: Tensor, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Return `tokens` with the rows that were taken as they are now."""
    return tokens if order is None else tokens.index_copy_(0, order, taken)


MixedLinear = differentiable("MixedLinear", MixedCall, _Saved, _compute, _gradients)
"""y of one `MixedCall`, and every gradient of it."""
