"""The token-sized ops of `ops.py` over the Triton kernels.

`forms.py` chooses, per shape, between the forms that `library_gemm.py` has and what only Triton
has: (c), one GEMM of our own that does it all.
"""

from torch import Tensor

from delora_kernels.backends.dropout import mask_groups
from delora_kernels.backends.grouped_stages import GroupedStages
from delora_kernels.backends.library_gemm import Stages
from delora_kernels.backends.triton import forms
from delora_kernels.backends.triton.add_parts import add_parts, finish_dy
from delora_kernels.backends.triton.dropout import drop
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.dy_sums import takes as takes_dy_sums
from delora_kernels.backends.triton.grouped import grouped_times_small, grouped_update
from delora_kernels.backends.triton.grouped_sums import grouped_sums
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.rank_gemm import takes as takes_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.scaled import scaled as scale_matrix
from delora_kernels.backends.triton.times_small import times_small, times_small_parts
from delora_kernels.backends.triton.token_sums import takes_term, token_sums
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaling

STAGES = Stages(
    times_small, times_small_parts, token_sums, takes_term, takes_dy_sums, dy_sums,
    finish_dy, add_parts, rank_update, scale_matrix, drop,
)  # fmt: skip

GROUPED = GroupedStages(grouped_times_small, grouped_update, grouped_sums)

grouped_linear = GROUPED.grouped_linear
grouped_backward = GROUPED.grouped_backward

project = STAGES.project
expand_backward = STAGES.expand_backward


keeps_folded = True
"""Â and B̂ are kept for backward: folded again there, they would cost a launch."""


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` wants row_norm's c ⊙ W: the pass that adds the rank-R term can't scale what
    comes after it.
    """
    return forms.choose("expand", x, weight.shape[0], weight.shape[1]) == forms.PREFILL


def expand(
    x: Tensor, weight: Tensor, bias: Tensor | None, term: RankTerm, rescaling: Rescaling
) -> tuple[Tensor, Tensor]:
    """y in one of the three forms; what DoRA keeps is x Wᵀ, which form (d) never sees."""
    form, (h, B_hat, scale), keep = forms.choose("expand", x, weight.shape[0], x.shape[1]), term, rescaling.keep
    if rescaling.seed is None and form == forms.OWN and takes_gemm(x, h, B_hat, scale, keep, None):
        y, kept = rank_gemm(x, weight.t(), h, B_hat.t(), scale, column=rescaling.c, bias=bias, keep=keep)
        return y, x.new_empty(0) if kept is None else kept
    return STAGES.expand(x, weight, bias, term, rescaling, prefill=form == forms.PREFILL)


def input_backward(dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks) -> tuple[Tensor, Tensor]:
    """Form (c) where our GEMM takes it; else as in library_gemm.py."""
    prefill, (weight, c, two_term), (dv, A_hat, _, _, scale) = True, frozen, branch
    if weight is not None:
        form = forms.choose("dx", dy, weight.shape[1], weight.shape[0])
        prefill = form == forms.PREFILL
        groups = mask_groups(dv.shape[1], masks)
        own = form == forms.OWN and not two_term and len(groups) == 1
        if own and A_hat is not None and takes_gemm(dy, dv, A_hat, scale, False, groups[0]):
            dA_hat = STAGES.factor_grad(branch, groups)
            return rank_gemm(*STAGES.scaled_operands(dy, weight, c), dv, A_hat, scale)[0], dA_hat
    return STAGES.input_backward(dy, frozen, branch, masks, prefill)
