"""The token-sized ops of `ops.py`: a library GEMM with a pass of ours before or after it, or our GEMM alone.

`forms.py` chooses, per shape: (b) the GEMM, then one pass over its output; (d) a pass that writes the rank-R term, to
which the GEMM then adds (beta = 1); (c) one GEMM of our own that does it all.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.eager.hashed_dropout import MaskGroup, mask_groups
from delora_kernels.backends.triton import forms
from delora_kernels.backends.triton.add_parts import DyParts, add_parts, finish_dy
from delora_kernels.backends.triton.dropout import drop
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.dy_sums import takes as takes_sums
from delora_kernels.backends.triton.launch import rows
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.rank_gemm import takes as takes_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.scaled import scaled as scale_matrix
from delora_kernels.backends.triton.times_small import times_small
from delora_kernels.backends.triton.token_sums import RankTerm, takes_term, token_sums


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` wants row_norm's c ⊙ W: the pass that adds the rank-R term can't scale what comes after it."""
    return forms.choose("expand", x, weight.shape[0], weight.shape[1]) == forms.PREFILL


def project(x: Tensor, A_hat: Tensor, ranks: Sequence[int], dropout_p: Sequence[float], seed: Tensor | None) -> Tensor:
    """drop(x) Âᵀ; x is read once for each mask."""
    groups = mask_groups(A_hat.shape[0], ranks, dropout_p, seed)
    parts = [times_small(x, A_hat[group.columns].t(), A_hat.dtype, group) for group in groups]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


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
    (T, K), N = x.shape, weight.shape[0]
    nothing, extra = x.new_empty(0), None
    form = forms.choose("expand", x, N, K)
    if seed is None and form == forms.OWN and takes_gemm(x, h, B_hat, scale, keep, None):
        y, kept = rank_gemm(x, weight.t(), h, B_hat.t(), scale, column=c, bias=bias, keep=keep)
        return y, nothing if kept is None else kept
    if seed is None and form == forms.PREFILL and not keep and (c is None or scaled is not None):
        y = rank_update(None, h, B_hat.t(), scale, x.new_empty((T, N)), column=c, bias=bias)
        return y.addmm_(x, (weight if scaled is None else scaled).t()), nothing
    if seed is None:
        base = linear(x, weight)
    else:
        dropped, rest = drop(x, dropout_p, seed)
        base, extra = linear(dropped, weight), linear(rest, weight)
    out = torch.empty_like(base) if keep else base
    y = rank_update(base, h, B_hat.t(), scale, out, column=c, extra=extra, bias=bias)
    return y, (base if keep else nothing)


def expand_backward(
    dy: Tensor,
    h: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    c: Tensor | None,
    kept: Tensor | None,
    kept_is_y: bool,
    divisor: Tensor | None,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read of dy at ranks up to 32, above one for dv and one for the sums; c meets the small operand in float32."""
    small = B_hat if c is None or B_hat is None else B_hat * c[:, None]
    dv, dtype = None, torch.float32 if B_hat is None else B_hat.dtype
    if small is not None and h is not None and takes_sums(dy, small, h):
        parts = dy_sums(dy, small, h, scale, need_bias, kept)
    else:
        dv = None if small is None else times_small(dy, small, dtype)
        empty = h is None and kept is None and not need_bias
        parts = DyParts(None, None, None, None) if empty else token_sums(dy, h, scale, sums=need_bias, y=kept)
    finished = finish_dy(parts, dtype, c, None if kept_is_y or kept is None else B_hat, divisor)
    dv = finished[0] if dv is None else dv
    wide = dy.new_empty(0, dtype=torch.float32)
    dB_hat, dm, dy_sum = (wide.clone() if result is None else result for result in finished[1:])
    return (dy.new_empty(0) if dv is None else dv), dB_hat, dm, dy_sum


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
    """dÂ from one read of x for each mask, which in form (d) writes the rank-R term of dx too; then the frozen GEMM."""
    groups = mask_groups(dv.shape[1], ranks, dropout_p, seed)
    form, prefill, on_the_way = forms.UPDATE, None, None
    if weight is not None and A_hat is not None and not two_term:
        form = forms.choose("dx", dy, weight.shape[1], weight.shape[0])
        if form == forms.PREFILL:
            prefill = dy.new_empty((dy.shape[0], weight.shape[1]))
            if x is not None and len(groups) == 1 and takes_term(x, dv, A_hat, groups[0]):
                on_the_way = RankTerm(A_hat, prefill)
    dA_hat = dv.new_empty(0, dtype=torch.float32)
    if x is not None:
        dA_hat = _factor_grad(dv, x, r, scale, groups, on_the_way)
    if weight is None or A_hat is None:
        return dy.new_empty(0), dA_hat
    if two_term and c is not None and seed is not None:
        return _two_term_dx(dy, weight, dv, A_hat, scale, c, dropout_p[0], seed), dA_hat
    dy, weight = _scaled_operands(dy, weight, c)
    if form == forms.OWN and len(groups) == 1 and takes_gemm(dy, dv, A_hat, scale, False, groups[0]):
        return rank_gemm(dy, weight, dv, A_hat, scale)[0], dA_hat
    dx = torch.mm(dy, weight) if prefill is None else prefill
    base = dx if prefill is None else None
    if on_the_way is None:
        for group in groups:
            term, small = dv[:, group.columns], A_hat[group.columns]
            base = rank_update(base, term, small, _factor(scale, group), dx, group=group)
    return (dx if prefill is None else dx.addmm_(dy, weight)), dA_hat


def _factor_grad(dv: Tensor, x: Tensor, r: int, scale: float, groups: list[MaskGroup], term: RankTerm | None) -> Tensor:
    """dÂ [r, K], float32, and the term of dx on the way, which needs all of dv's columns."""
    blocks = [(dv[:, group.columns], group) for group in groups]
    if len(groups) == 1 and term is None:
        blocks = [(dv.narrow(1, 0, r), groups[0])]
    parts = [token_sums(x, block, scale, group=group, transposed=True, term=term).product for block, group in blocks]
    found = [add_parts(product, torch.float32) for product in parts if product is not None]
    dA_hat = found[0] if len(found) == 1 else torch.cat(found)
    return dA_hat if len(dA_hat) == r else dA_hat[:r].clone()


def _factor(scale: float, group: MaskGroup) -> float:
    return scale / (1 - group.dropout_p)


def _scaled_operands(dy: Tensor, weight: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy and W with c on the smaller of them: the one transient."""
    if c is None:
        return dy, weight
    if dy.shape[0] <= weight.shape[1]:
        return scale_matrix(dy, c, by_row=False), weight
    return dy, scale_matrix(weight, c, by_row=True)


def _two_term_dx(
    dy: Tensor, weight: Tensor, dv: Tensor, A_hat: Tensor, scale: float, c: Tensor, p: float, seed: Tensor
) -> Tensor:
    """dy W + drop((dy ⊙ (c − 1)) W + scale · dv Â)."""
    dropped = rows(torch.mm(*_scaled_operands(dy, weight, (c - 1) / (1 - p))))
    group = MaskGroup(slice(0, dv.shape[1]), p, seed)
    extra = torch.mm(dy, weight)
    return rank_update(dropped, dv, A_hat, _factor(scale, group), dropped, extra=extra, group=group, mask_base=True)
