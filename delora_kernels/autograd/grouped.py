"""The autograd Function of an expert model's linears, tokens sorted by expert e:

    y_e = c_e ⊙ u_e + bias_e,   u_e = x_e W_eᵀ + scale · drop(x_e) A_eᵀ B_eᵀ

c_e is 1, or DoRA's magnitude over the norm of each row of W_e + scale · B_e A_e, which counts as a
constant.

Nothing of the size of all experts' weights is written or kept (dW apart, where W trains). Kept are
x, h [T, r] and the caller's own tensors, of DoRA u too, of these only what the wanted gradients
need. Where the call takes its rows from tokens, these are what is kept, and the rows are taken
again: a copy costs little beside the GEMMs, and each token has several.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from delora_kernels.autograd.function import Computed, differentiable
from delora_kernels.autograd.grouped_stored import each_dense, grouped_backward, grouped_linear
from delora_kernels.autograd.routed_rows import summed_rows
from delora_kernels.call import GroupedCall, GroupedOptions
from delora_kernels.dtypes import accumulate_dtype


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    h: Tensor | None
    weight: Tensor | None
    A: Tensor | None
    B: Tensor | None
    offsets: Tensor
    rows: Tensor | None
    places: Tensor | None
    seed: Tensor | None
    u: Tensor | None
    c: Tensor | None
    norm: Tensor | None


def _compute(call: GroupedCall, x: Tensor, need: GroupedCall, stages: Any) -> Computed:
    o = call.options
    A_hat, B_hat = (_factor(each, o) for each in (call.A, call.B))
    sorted_x = x if call.rows is None else x.index_select(0, call.rows)
    own = call.bias if call.magnitude is None else None
    dropout = (o.dropout_p[0], call.seed)
    y, h = grouped_linear(stages, sorted_x, call.weight, own, call.offsets, A_hat, B_hat, o.scale, *dropout)
    u = c = norm = None
    if call.magnitude is not None:
        u, norm = y, _row_norms(call, A_hat, B_hat, stages)
        c = call.magnitude.to(norm.dtype) / norm.masked_fill(norm == 0, torch.inf)
        y = _rescaled(u, c, call.bias, call.offsets)
    saved = _Saved(
        x=x if need.A or need.weight else None,
        h=h if need.B else None,
        weight=call.weight if need.x else None,
        A=call.A if need.x else None,
        B=call.B if need.x or need.A else None,
        offsets=call.offsets,
        rows=call.rows,
        places=call.places if need.x else None,
        seed=call.seed if need.x or need.A else None,
        u=u if need.magnitude else None,
        c=c,
        norm=norm if need.magnitude else None,
    )
    return Computed((y,), saved, (call.A, call.B, call.magnitude))


def _gradients(o: GroupedOptions, need: GroupedCall, saved: Any, stages: Any, dy: Tensor) -> dict[str, Any]:
    grad: dict[str, Any] = {}
    x = saved.x if saved.x is None or saved.rows is None else saved.x.index_select(0, saved.rows)
    A_hat, B_hat = (_factor(each, o) for each in (saved.A, saved.B))
    need_bias, dropout, weight, h = bool(need.bias), (o.dropout_p[0], saved.seed), saved.weight, saved.h
    if saved.c is not None:  # c goes onto B for dA and onto dB, whatever dy's dtype; dx alone is made of c ⊙ dy
        if saved.u is not None:
            sums = _sums(dy.to(saved.norm.dtype) * saved.u.to(saved.norm.dtype), saved.offsets, stages)
            grad["magnitude"] = sums / saved.norm.masked_fill(saved.norm == 0, torch.inf)
        if need.A or need.B or need_bias:
            B_c = None if B_hat is None else (B_hat * saved.c[:, :, None]).to(B_hat.dtype)
            apart = (x if need.A else None, h, None, saved.offsets, None, B_c)
            _, grad["A"], dB, grad["bias"] = grouped_backward(stages, dy, *apart, o.scale, need_bias, *dropout)
            grad["B"] = dB if h is None else dB * saved.c[:, :, None]
        dy, need_bias, h = _rescaled(dy, saved.c, None, saved.offsets), False, None
    wants_factors = saved.c is None and (need.A or need.B)
    if need.x or wants_factors or need_bias:
        seen = (x if need.A and wants_factors else None, h, weight, saved.offsets, A_hat, B_hat)
        dx, dA, dB, dbias = grouped_backward(stages, dy, *seen, o.scale, need_bias, *dropout)
        grad = {"A": dA, "B": dB, "bias": dbias} | grad
        grad["x"] = dx if saved.places is None else summed_rows(dx, saved.places)
    if need.weight:
        grad["weight"] = stages.grouped_weight_grad(dy, x, saved.offsets)
    return grad


def _factor(factor: Tensor | None, o: GroupedOptions) -> Tensor | None:
    """Return a factor in the rank dtype, each expert's matrix in one piece: PEFT's lies across all
    experts.
    """
    if factor is None:
        return None
    factor = factor if factor.dtype == o.rank_dtype else factor.to(o.rank_dtype)
    if factor.stride(2) == 1 or factor.stride(1) == 1:
        return factor
    E, rows, columns = factor.shape
    if factor.permute(1, 2, 0).is_contiguous():  # PEFT's B: the transpose of a matrix is copied twice as fast
        across = factor.permute(1, 2, 0).view(rows, columns * E)
        return across.t().contiguous().view(columns, E, rows).permute(1, 2, 0)
    return factor.mT.contiguous().mT


def _row_norms(call: GroupedCall, A_hat: Tensor | None, B_hat: Tensor | None, stages: Any) -> Tensor:
    """‖W_e + scale · B_e A_e‖ by rows, [E, N]: each W_e is read once, with rows or without; by one
    call where W is there as it is multiplied.
    """
    assert A_hat is not None
    assert B_hat is not None
    weight, dtype, scale = call.weight, call.options.compute_dtype, call.options.scale
    if isinstance(weight, Tensor) and weight.dtype == dtype and not is_traceable_wrapper_subclass(weight):
        norms: Tensor = stages.row_norm(weight, A_hat, B_hat, scale, None, False)[0]
        return norms
    each = zip(each_dense(weight, dtype), A_hat, B_hat, strict=True)
    return torch.stack([stages.row_norm(W, A, B, scale, None, False)[0] for W, A, B in each])


def _rescaled(rows: Tensor, c: Tensor, bias: Tensor | None, offsets: Tensor) -> Tensor:
    """c_e ⊙ rows_e + bias_e, rounded once; 0 in rows that are nobody's."""
    experts = torch.searchsorted(offsets, torch.arange(len(rows), device=rows.device, dtype=offsets.dtype), right=True)
    nobodys = (experts == len(offsets))[:, None]
    experts = experts.clamp(max=len(offsets) - 1)
    scaled = rows.to(c.dtype) * c[experts]
    if bias is not None:
        scaled += bias.to(c.dtype)[experts]
    return scaled.masked_fill_(nobodys, 0).to(rows.dtype)


def _sums(rows: Tensor, offsets: Tensor, stages: Any) -> Tensor:
    """Σ_t rows_e, [E, N]."""
    sums: Tensor = stages.grouped_backward(rows, None, None, None, offsets, None, None, 1.0, True, 0.0, None)[3]
    return sums.to(accumulate_dtype(rows.dtype))


GroupedLinear = differentiable("GroupedLinear", GroupedCall, _Saved, _compute, _gradients)
"""y of one `GroupedCall`, and every gradient of it."""
