"""The token-sized ops of `ops.py`, each a library GEMM, one of the kernels here, or one after the other."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.eager.hashed_dropout import MaskGroup, mask_groups
from delora_kernels.backends.eager.low_rank import scaled_gemm
from delora_kernels.backends.triton.dropout import drop
from delora_kernels.backends.triton.dy_sums import dy_sums, takes
from delora_kernels.backends.triton.launch import rows
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.times_small import times_small
from delora_kernels.backends.triton.token_sums import token_sums


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
    keep: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The frozen GEMM, then one pass over it; what DoRA keeps is x Wᵀ, so that pass writes elsewhere then."""
    extra = None
    if seed is None:
        base = linear(x, weight)
    else:
        dropped, rest = drop(x, dropout_p, seed)
        base, extra = linear(dropped, weight), linear(rest, weight)
    out = torch.empty_like(base) if keep else base
    y = rank_update(base, h, B_hat.t(), scale, out, column=c, extra=extra, bias=bias)
    return y, (base if keep else x.new_empty(0))


def expand_backward(
    dy: Tensor,
    h: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    c: Tensor | None,
    kept: Tensor | None,
    kept_is_y: bool,
    need_bias: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One read of dy at ranks up to 32, above one for dv and one for the sums; c meets the small operand in float32."""
    small = B_hat if c is None or B_hat is None else B_hat * c[:, None]
    if small is not None and h is not None and takes(dy, small, h):
        dv, (product, dy_sum, dy_dot_u) = dy_sums(dy, small, h, scale, need_bias, kept)
    else:
        dv = dy.new_empty(0) if small is None or B_hat is None else times_small(dy, small, B_hat.dtype)
        product, dy_sum, dy_dot_u = token_sums(dy, h, scale, sums=need_bias, y=kept)
    if dy_dot_u is not None and product is not None and B_hat is not None and not kept_is_y:
        dy_dot_u = dy_dot_u + (product * B_hat).sum(1)  # kept is x Wᵀ: the rest of u is in dB̂ already
    if product is not None and c is not None:
        product = product * c[:, None]
    empty = dy.new_empty(0, dtype=torch.float32)
    return (
        dv,
        empty if product is None else product,
        empty.clone() if dy_dot_u is None else dy_dot_u,
        empty.clone() if dy_sum is None else dy_sum,
    )


def input_grad(
    dy: Tensor,
    weight: Tensor,
    dv: Tensor,
    A_hat: Tensor,
    scale: float,
    c: Tensor | None,
    ranks: Sequence[int],
    dropout_p: Sequence[float],
    seed: Tensor | None,
    two_term: bool,
) -> Tensor:
    """The frozen GEMM on dy, then one pass over it for each mask."""
    if two_term and c is not None and seed is not None:
        p = dropout_p[0]
        group = MaskGroup(slice(0, dv.shape[1]), p, seed)
        dropped = rows(scaled_gemm(dy, weight, (c - 1) / (1 - p)))
        extra = torch.mm(dy, weight)
        return rank_update(dropped, dv, A_hat, scale / (1 - p), dropped, extra=extra, group=group, mask_base=True)
    dx = scaled_gemm(dy, weight, c)
    for group in mask_groups(dv.shape[1], ranks, dropout_p, seed):
        term, small = dv[:, group.columns], A_hat[group.columns]
        dx = rank_update(dx, term, small, scale / (1 - group.dropout_p), dx, group=group)
    return dx


def project_backward(
    dv: Tensor, x: Tensor, scale: float, ranks: Sequence[int], dropout_p: Sequence[float], seed: Tensor | None
) -> Tensor:
    """scale · dvᵀ drop(x), float32; x is read once for each mask."""
    groups = mask_groups(dv.shape[1], ranks, dropout_p, seed)
    parts = [token_sums(x, dv[:, group.columns], scale, group=group).product for group in groups]
    return torch.cat([part.t() for part in parts if part is not None])
