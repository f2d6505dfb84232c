"""The token-sized ops of `ops.py`: a library GEMM with a pass of ours before or after it.

(d) where nothing stands against it: a pass writes the rank-R term, to which the GEMM then adds (beta = 1). Where the
GEMM's own result is kept or masked, (b): the GEMM, then one pass over its output, in place. docs/kernels.md has both.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.cuda.kernels import (
    Sums,
    add_parts,
    drop,
    finish_dy,
    rank_update,
    scale_matrix,
    times_small,
    token_sums,
)
from delora_kernels.backends.cuda.launch import rows
from delora_kernels.backends.eager.hashed_dropout import MaskGroup, mask_groups


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` wants row_norm's c ⊙ W: the pass of form (d) can't scale what comes after it."""
    return True


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
    """y in form (d), or in (b) where x Wᵀ is kept for backward or dropout asks for two products."""
    nothing, extra = x.new_empty(0), None
    if seed is None and not keep and (c is None or scaled is not None):
        y = x.new_empty((x.shape[0], weight.shape[0]))
        rank_update(None, h, B_hat.t(), scale, y, column=c, bias=bias)
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
    """One read of dy for dv and one for the sums; c meets the small operand in float32."""
    small = B_hat if c is None or B_hat is None else B_hat * c[:, None]
    dv = dy.new_empty(0) if small is None or B_hat is None else times_small(dy, small, B_hat.dtype)
    found = Sums(None, None, None)
    if h is not None or kept is not None or need_bias:
        found = token_sums(dy, h, scale, sums=need_bias, y=kept)
    finished = finish_dy(found, c, None if kept_is_y or kept is None else B_hat, divisor)
    wide = dy.new_empty(0, dtype=torch.float32)
    dB_hat, dm, dy_sum = (wide.clone() if result is None else result for result in finished)
    return dv, dB_hat, dm, dy_sum


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
    """dÂ from one read of x for each mask, and dx in form (d)."""
    groups = mask_groups(dv.shape[1], ranks, dropout_p, seed)
    dA_hat = dv.new_empty(0, dtype=torch.float32) if x is None else _factor_grad(dv, x, r, scale, groups)
    if weight is None or A_hat is None:
        return dy.new_empty(0), dA_hat
    if two_term and c is not None and seed is not None:
        return _two_term_dx(dy, weight, dv, A_hat, scale, c, groups[0]), dA_hat
    dx, base = dy.new_empty((dy.shape[0], weight.shape[1])), None
    for group in groups:
        term, small = dv[:, group.columns], A_hat[group.columns]
        base = rank_update(base, term, small, scale / (1 - group.dropout_p), dx, group=group)
    return dx.addmm_(*_scaled_operands(dy, weight, c)), dA_hat


def _factor_grad(dv: Tensor, x: Tensor, r: int, scale: float, groups: list[MaskGroup]) -> Tensor:
    """dÂ [r, K], float32."""
    if len(groups) == 1:
        groups = [groups[0]._replace(columns=slice(0, r))]
    sums = [token_sums(x, dv[:, group.columns], scale, group=group, transposed=True).product for group in groups]
    found = [add_parts(product, torch.float32) for product in sums if product is not None]
    dA_hat = found[0] if len(found) == 1 else torch.cat(found)
    return dA_hat if len(dA_hat) == r else dA_hat[:r].clone()


def _scaled_operands(dy: Tensor, weight: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy and W with c on the smaller of them: the one transient."""
    if c is None:
        return dy, weight
    if dy.shape[0] <= weight.shape[1]:
        return scale_matrix(dy, c, by_row=False), weight
    return dy, scale_matrix(weight, c, by_row=True)


def _two_term_dx(
    dy: Tensor, weight: Tensor, dv: Tensor, A_hat: Tensor, scale: float, c: Tensor, group: MaskGroup
) -> Tensor:
    """dy W + drop((dy ⊙ (c − 1)) W + scale · dv Â)."""
    inverse = 1 / (1 - group.dropout_p)
    dropped = rows(torch.mm(*_scaled_operands(dy, weight, (c - 1) * inverse)))
    extra = torch.mm(dy, weight)
    return rank_update(dropped, dv, A_hat, scale * inverse, dropped, extra=extra, group=group, mask_base=True)
