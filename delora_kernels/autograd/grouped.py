"""The autograd Function of an expert model's linears: y_e = x_e W_eᵀ + scale · x_e A_eᵀ B_eᵀ +
bias_e, tokens sorted by expert e.

Nothing of the size of all experts' weights is written or kept (dW apart, where W trains). Kept are
x, h [T, r] and the caller's own tensors, of these only what the wanted gradients need. Where the
call takes its rows from tokens, these are what is kept, and the rows are taken again: a copy costs
little beside the GEMMs, and each token has several.
"""

from typing import Any, NamedTuple

from torch import Tensor

from delora_kernels.autograd.function import Computed, differentiable
from delora_kernels.autograd.grouped_stored import grouped_backward, grouped_linear
from delora_kernels.autograd.routed_rows import summed_rows
from delora_kernels.call import GroupedCall, GroupedOptions


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


def _compute(call: GroupedCall, x: Tensor, need: GroupedCall, stages: Any) -> Computed:
    o = call.options
    A_hat, B_hat = (_factor(each, o) for each in (call.A, call.B))
    sorted_x = x if call.rows is None else x.index_select(0, call.rows)
    y, h = grouped_linear(stages, sorted_x, call.weight, call.bias, call.offsets, A_hat, B_hat, o.scale)
    saved = _Saved(
        x=x if need.A or need.weight else None,
        h=h if need.B else None,
        weight=call.weight if need.x else None,
        A=call.A if need.x else None,
        B=call.B if need.x or need.A else None,
        offsets=call.offsets,
        rows=call.rows,
        places=call.places if need.x else None,
    )
    return Computed((y,), saved, (call.A, call.B))


def _gradients(o: GroupedOptions, need: GroupedCall, saved: Any, stages: Any, dy: Tensor) -> dict[str, Any]:
    grad: dict[str, Any] = {}
    x = saved.x if saved.x is None or saved.rows is None else saved.x.index_select(0, saved.rows)
    if need.x or need.A or need.B or need.bias:
        A_hat, B_hat = (_factor(each, o) for each in (saved.A, saved.B))
        dx, grad["A"], grad["B"], grad["bias"] = grouped_backward(
            stages,
            dy,
            x if need.A else None,
            saved.h,
            saved.weight,
            saved.offsets,
            A_hat,
            B_hat,
            o.scale,
            bool(need.bias),
        )
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
    return factor if factor.stride(2) == 1 or factor.stride(1) == 1 else factor.mT.contiguous().mT


GroupedLinear = differentiable("GroupedLinear", GroupedCall, _Saved, _compute, _gradients)
"""y of one `GroupedCall`, and every gradient of it."""
