"""The autograd Function of a rank term beside a base that runs its own forward:
y = base(x) + scale · drop(x) Âᵀ B̂ᵀ.

One out-of-place GEMM onto the base's output, which is nobody's to write into. Backward hands dy on
to the base as it is, and gives dx its term. Kept: x, h [T, R], Â and B̂.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels.autograd.function import Computed, differentiable
from delora_kernels.backends.eager.low_rank import add_rank_term
from delora_kernels.call import Options, TermCall
from delora_kernels.op_arguments import Branch, Frozen, Masks, Rescaled, TermGradients


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    h: Tensor | None
    A: Tensor
    B: Tensor
    seed: Tensor | None


def _compute(call: TermCall, x: Tensor, need: TermCall, stages: Any) -> Computed:
    """Return y [T, N]."""
    o = call.options
    A_hat, B_hat = call.A.to(o.rank_dtype), call.B.to(o.rank_dtype)
    h = stages.project(x, A_hat, Masks(o.ranks, o.dropout_p, call.seed))
    if h.dtype == call.y.dtype:
        y = torch.addmm(call.y, h, B_hat.t(), alpha=o.scale)
    else:
        y = add_rank_term(call.y.clone(memory_format=torch.contiguous_format), h, B_hat.t(), o.scale)
    return Computed((y,), _Saved(x if need.A else None, h if need.B else None, call.A, call.B, call.seed))


def _gradients(o: Options, need: TermCall, saved: _Saved, stages: Any, dy: Tensor) -> dict[str, Tensor | None]:
    A_hat, B_hat = saved.A.to(o.rank_dtype), saved.B.to(o.rank_dtype)
    term = TermGradients(saved.h, B_hat if need.x or need.A else None, o.scale)
    dv, dB, _, _ = stages.expand_backward(dy, term, Rescaled(), False)
    grad: dict[str, Tensor | None] = {"y": dy, "B": dB}
    if need.x or need.A:
        # of a base without outputs: what is left of dx is the branch's
        nothing = dy.new_empty((dy.shape[0], 0), dtype=o.compute_dtype)
        empty = nothing.new_empty((0, A_hat.shape[1]))
        branch = Branch(dv, A_hat if need.x else None, saved.x, dv.shape[1], o.scale)
        frozen, masks = Frozen(empty if need.x else None), Masks(o.ranks, o.dropout_p, saved.seed)
        grad["x"], grad["A"] = stages.input_backward(nothing, frozen, branch, masks)
    return grad


BesideBase = differentiable("BesideBase", TermCall, _Saved, _compute, _gradients)
"""y of one `TermCall`, and every gradient of it."""
