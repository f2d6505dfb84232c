"""The autograd Function of a batch whose samples have LoRA adapters of their own:

    y_t = x_t Wᵀ + scale_i · x_t A_iᵀ B_iᵀ + bias,   i the adapter of row t

One frozen GEMM for all rows. Each segment, rows of one adapter, has its term written first, where
the GEMM adds to it (which hides reading it), or put on top of it in place, where rows are taken out
of their order or dtypes differ. Kept are x, h [Σ rows · rank] and the factors. Each product reads
and writes views: of factors and h the part of an adapter or a segment is contiguous. Segments that
are alike run as one batch (alike_segments.py).
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.autograd.alike_segments import are_alike, gradients_of_terms, write_terms
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
    weight, bias = dense(call.weight, o.compute_dtype), None if call.bias is None else call.bias.to(tokens.dtype)
    first = _comes_first(call.order, o)
    y = tokens.new_empty((len(tokens), len(weight))) if first else linear(tokens, weight, bias)
    taken, out = _taken(tokens, call.order), _taken(y, call.order)
    if are_alike(o):
        if first and bias is not None:
            y.copy_(bias)
        kept = [write_terms(taken, call.A, call.B, out, not first or bias is not None, o)]
    else:
        kept = _write_segments(taken, call.A, call.B, out, bias, first, o)
    if first:
        y.addmm_(tokens, weight.t())
    saved = _Saved(
        x=x if need.A or need.weight else None,
        h=(kept[0] if len(kept) == 1 else torch.cat(kept or [tokens.new_empty(0)])) if need.B else None,
        weight=call.weight if need.x else None,
        A=call.A if need.x else None,
        B=call.B if need.x or need.A else None,
        order=call.order,
    )
    return Computed((_given_back(out, y, call.order),), saved, (call.A, call.B))


def _write_segments(
    tokens: Tensor, A_all: Tensor, B_all: Tensor, out: Tensor, bias: Tensor | None, first: bool, o: MixedOptions
) -> list[Tensor]:
    """Write each segment's term into its rows of `out`, or add it there, and return each h."""
    A, B, kept = _by_adapter(A_all, o), _B_of(B_all, o), []
    for i, x_s, y_s in zip(o.adapters, _by_segment(tokens, o), _by_segment(out, o), strict=True):
        if i is not None:
            h = project(x_s, A[i], _NO_DROPOUT)
            _write(y_s, bias, h, B[i].t(), o.scales[i]) if first else add_rank_term(y_s, h, B[i].t(), o.scales[i])
            kept.append(h.view(-1))
        elif first:
            _fill(y_s, bias)
    return kept


def _gradients(o: MixedOptions, need: MixedCall, saved: Any, stages: Any, dy: Tensor) -> dict[str, Any]:
    grad: dict[str, Any] = {"bias": torch.sum(dy, 0, dtype=accumulate_dtype(dy.dtype)) if need.bias else None}
    x: Any = None if saved.x is None else _rows(saved.x)
    if need.weight:
        grad["weight"] = torch.mm(dy.t(), x)
    wide = accumulate_dtype(o.rank_dtype)
    weight: Any = dense(saved.weight, o.compute_dtype) if need.x else None
    batched = not torch.compiler.is_compiling() and is_batched(dy)
    if not batched and saved.order is None and wide == o.rank_dtype and are_alike(o):
        dx = dy.new_empty((len(dy), weight.shape[1])) if need.x else None
        grad |= gradients_of_terms(need, saved, x, dy, dx, o)
        return grad | {"x": None if dx is None else dx.addmm_(dy, weight)}
    A, B = _by_adapter(saved.A, o), _B_of(saved.B, o)
    dy_s, x_s, h = _by_segment(_taken(dy, saved.order), o), _by_segment(_taken(x, saved.order), o), _h(saved.h, o)
    if batched:
        return grad | _out_of_place(o, need, saved, torch.mm(dy, weight) if need.x else None, dy_s, x_s, h)
    dx, first = None, _comes_first(saved.order, o)
    if need.x:
        dx = dy.new_empty((len(dy), weight.shape[1])) if first else torch.mm(dy, weight)
    taken = _taken(dx, saved.order)
    dx_s = _by_segment(taken, o)
    dA_i: Any = [x.new_empty((r, x.shape[1]), dtype=wide) for r in o.ranks] if need.A else ()
    dB_i: Any = [dy.new_empty((r, dy.shape[1]), dtype=wide) for r in o.ranks] if need.B else ()
    begun: set[int] = set()
    for s, i in enumerate(o.adapters):
        if i is None:
            if first and need.x:
                dx_s[s].zero_()
            continue
        if need.B:
            _add_product(dB_i[i], h[s], dy_s[s], o.scales[i], i in begun)
        if B:
            dv = rank_gradients(dy_s[s], TermGradients(None, B[i]), None)[0]
            if need.A:
                _add_product(dA_i[i], dv, x_s[s], o.scales[i], i in begun)
            if need.x:
                _write(dx_s[s], None, dv, A[i], o.scales[i]) if first else add_rank_term(dx_s[s], dv, A[i], o.scales[i])
        begun.add(i)
    if dx is not None:
        grad["x"] = dx.addmm_(dy, weight) if first else _given_back(taken, dx, saved.order)
    return grad | _joined(dA_i, [dB.t() for dB in dB_i])


def _comes_first(order: Tensor | None, o: MixedOptions) -> bool:
    """Whether the terms are written before the frozen GEMM adds to them."""
    return order is None and bool(o.ranks) and o.compute_dtype == o.rank_dtype


def _write(out: Tensor, bias: Tensor | None, left: Tensor, right: Tensor, scale: float) -> None:
    """out = bias + scale · left right."""
    if bias is None:
        out.addmm_(left, right, beta=0, alpha=scale)
    else:
        out.copy_(bias).addmm_(left, right, alpha=scale)


def _fill(out: Tensor, bias: Tensor | None) -> None:
    """Write the bias, or zeros, into each row."""
    if bias is None:
        out.zero_()
    else:
        out.copy_(bias)


def _add_product(total: Tensor, left: Tensor, tokens: Tensor, scale: float, begun: bool) -> None:
    """total += scale · leftᵀ tokens; = of the first."""
    if left.dtype == tokens.dtype == total.dtype:
        total.addmm_(left.t(), tokens, beta=int(begun), alpha=scale)
        return
    part = factor_grad(left, tokens, scale)
    total.add_(part) if begun else total.copy_(part)


def _out_of_place(o: MixedOptions, need: MixedCall, saved: Any, dx: Any, dy_s: Any, x_s: Any, h: Any) -> dict[str, Any]:
    """Return the same gradients of a batch of dy, which can't be summed into what is no batch."""
    wide = accumulate_dtype(o.rank_dtype)
    dA: list[Any] = [0.0] * len(o.ranks)
    dB: list[Any] = [0.0] * len(o.ranks)
    A, B = ([each.to(wide) for each in of] for of in (_by_adapter(saved.A, o), _B_of(saved.B, o)))
    starts = [sum(o.lengths[:s]) for s in range(len(o.lengths))]
    for s, i in enumerate(o.adapters):
        if i is None:
            continue
        dy = dy_s[s].to(wide) * o.scales[i]
        dv = torch.mm(dy, B[i]) if B else dy
        if need.B:
            dB[i] = dB[i] + torch.mm(dy.t(), h[s].to(wide))
        if need.A:
            dA[i] = dA[i] + torch.mm(dv.t(), x_s[s].to(wide))
        if dx is not None:
            places = torch.arange(starts[s], starts[s] + len(dy), device=dy.device)
            places = places if saved.order is None else saved.order[places]
            dx = dx.index_add(0, places, torch.mm(dv, A[i]).to(dx.dtype))
    return {"x": dx} | _joined(dA if need.A else (), dB if need.B else ())


def _rows(x: Tensor) -> Tensor:
    """x [..., K] as [T, K]."""
    return x if x.dim() == 2 else x.flatten(0, -2)


def _by_adapter(factors: Tensor | None, o: MixedOptions) -> Sequence[Any]:
    """Return each adapter's A [r, K]."""
    return () if factors is None else _in_rank_dtype(factors, o).split(o.ranks)


def _B_of(flat: Tensor | None, o: MixedOptions) -> Sequence[Any]:
    """Return each adapter's B [N, r]."""
    if flat is None:
        return ()
    N = flat.shape[0] // max(1, sum(o.ranks))
    parts = _in_rank_dtype(flat, o).split([N * r for r in o.ranks])
    return [part.view(N, r) for part, r in zip(parts, o.ranks, strict=True)]


def _in_rank_dtype(factors: Tensor, o: MixedOptions) -> Tensor:
    return factors if factors.dtype == o.rank_dtype else factors.to(o.rank_dtype)


def _joined(dA: Sequence[Tensor], dB: Sequence[Tensor]) -> dict[str, Tensor | None]:
    """Return the adapters' gradients as the call has their factors; None: not wanted."""
    return {
        "A": torch.cat(list(dA)) if dA else None,
        "B": torch.cat([each.reshape(-1) for each in dB]) if dB else None,
    }


def _by_segment(tokens: Tensor | None, o: MixedOptions) -> Sequence[Any]:
    """Return each segment's rows."""
    return () if tokens is None else tokens.split(o.lengths)


def _h(kept: Tensor | None, o: MixedOptions) -> Sequence[Any]:
    """Return each segment's h [rows, rank]; a segment without an adapter has none."""
    if kept is None:
        return ()
    ranks = [0 if i is None else o.ranks[i] for i in o.adapters]
    parts = kept.split([length * rank for length, rank in zip(o.lengths, ranks, strict=True)])
    return [part.view(length, rank) for part, length, rank in zip(parts, o.lengths, ranks, strict=True)]


def _taken(tokens: Tensor | None, order: Tensor | None) -> Any:
    """Return the rows as the segments count them: themselves, or a copy in `order`."""
    return tokens if order is None or tokens is None else tokens.index_select(0, order)


def _given_back(taken: Tensor, tokens: Tensor, order: Tensor | None) -> Tensor:
    """Return `tokens` with the rows that were taken as they are now."""
    return tokens if order is None else tokens.index_copy_(0, order, taken)


MixedLinear = differentiable("MixedLinear", MixedCall, _Saved, _compute, _gradients)
"""y of one `MixedCall`, and every gradient of it."""
