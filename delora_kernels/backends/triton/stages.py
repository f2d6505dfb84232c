"""The token-sized ops of `ops.py` over the Triton kernels.

`forms.py` chooses, per shape, between the forms that `gemm_stages.py` has and what only Triton has: (c), one GEMM of
our own that does it all.
"""

from collections.abc import Sequence

from torch import Tensor

from delora_kernels.backends.dropout import mask_groups
from delora_kernels.backends.library_gemm import Stages
from delora_kernels.backends.triton import forms
from delora_kernels.backends.triton.add_parts import add_parts, finish_dy
from delora_kernels.backends.triton.dropout import drop
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.dy_sums import takes as takes_dy_sums
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.rank_gemm import takes as takes_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.scaled import scaled as scale_matrix
from delora_kernels.backends.triton.times_small import times_small, times_small_parts
from delora_kernels.backends.triton.token_sums import takes_term, token_sums

STAGES = Stages(
    times_small, times_small_parts, token_sums, takes_term, takes_dy_sums, dy_sums,
    finish_dy, add_parts, rank_update, scale_matrix, drop,
)  # fmt: skip

project = STAGES.project
expand_backward = STAGES.expand_backward


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` wants row_norm's c ⊙ W: the pass that adds the rank-R term can't scale what comes after it."""
    return forms.choose("expand", x, weight.shape[0], weight.shape[1]) == forms.PREFILL


def expand(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    h: Tensor,
    B_hat: Tensor,
    scale: float,
    c: Tensor | None,
    scaled: Tensor | None,
    keep: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """y in one of the three forms; what DoRA keeps is x Wᵀ, which form (d) never sees."""
    form = forms.choose("expand", x, weight.shape[0], x.shape[1])
    if seed is None and form == forms.OWN and takes_gemm(x, h, B_hat, scale, keep, None):
        y, kept = rank_gemm(x, weight.t(), h, B_hat.t(), scale, column=c, bias=bias, keep=keep)
        return y, x.new_empty(0) if kept is None else kept
    prefill = form == forms.PREFILL
    return STAGES.expand(x, weight, bias, h, B_hat, scale, c, scaled, keep, dropout_p, seed, prefill)


def input_backward(
    dy: Tensor,
    weight: Tensor | None,
    dv: Tensor,
    A_hat: Tensor | None,
    x: Tensor | None,
    r: int,
    scale: float,
    c: Tensor | None,
    ranks: Sequence[int],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    two_term: bool,
) -> tuple[Tensor, Tensor]:
    """Form (c) where our GEMM takes it; else as in gemm_stages.py."""
    prefill = True
    if weight is not None:
        form = forms.choose("dx", dy, weight.shape[1], weight.shape[0])
        prefill = form == forms.PREFILL
        groups = mask_groups(dv.shape[1], ranks, dropout_p, seed)
        own = form == forms.OWN and not two_term and len(groups) == 1
        if own and A_hat is not None and takes_gemm(dy, dv, A_hat, scale, False, groups[0]):
            dA_hat = STAGES.factor_grad(dv, x, r, scale, groups)
            return rank_gemm(*STAGES.scaled_operands(dy, weight, c), dv, A_hat, scale)[0], dA_hat
    return STAGES.input_backward(
        dy, weight, dv, A_hat, x, r, scale, c, ranks, dropout_p, seed, two_term, prefill
    )  # fmt: skip
