"""Schemas of the primitive ops and their fakes: the contract every backend meets.

An op is one stage of the equation in docs/math.md, on 2-D tensors, with no autograd of its own: the
Functions of autograd/ decide which of them run in which order. Letters: T tokens, K in-features, N
out-features, R total rank, r trainable rank, E experts. `acc` is float64 for float64 tensors and
float32 for everything else.

Below, an op is written once: its arguments and results, its formula, and what a fake run returns;
`op_registry.py` does the rest.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import (
    Branch,
    ExpertFactors,
    Folded,
    Frozen,
    Gated,
    Gating,
    Masks,
    RankTerm,
    Rescaled,
    Rescaling,
    Start,
    Strength,
    TermGradients,
)
from delora_kernels.op_registry import NAMESPACE, OPS, PLAIN, flat, op, packed, registered, stages

__all__ = ["NAMESPACE", "PLAIN", "flat", "packed", "registered", "stages"]


def _acc(like: Tensor, *shape: Any) -> Tensor:
    return like.new_empty(shape, dtype=accumulate_dtype(like.dtype))


@op
def fold(
    A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """DeLoRA's normalisation, O(R(K+N)): → Â [R, K], B̂ [N, R] in `dtype`, row norms a [R], column
    norms b [R] (acc).

    Â = diag(1/max(a, eps)) A diag(n),  B̂ = B diag(λ / (r max(b, eps))); a frozen start is stacked
    behind with −λ. Without λ (LoRA, DoRA) nothing is normalised: the factors are cast, and the
    norms have size 0.
    """
    R = A.shape[0] + (0 if start.frozen_A is None else start.frozen_A.shape[0])
    A_hat, norms = A.new_empty((R, A.shape[1]), dtype=dtype), 0 if strength.lam is None else R
    return A_hat, B.new_empty((B.shape[0], R), dtype=dtype), _acc(A_hat, norms), _acc(A_hat, norms)


@op
def fold_backward(
    dA_hat: Tensor | None, dB_hat: Tensor | None, folded: Folded, strength: Strength
) -> tuple[Tensor, Tensor, Tensor]:
    """Do the inverse of fold for gradients: dÂ [r, K], dB̂ [N, R] (acc) → dA, dB in the
    factors' dtypes, dλ [1] (acc).

    dA_i ⟂ A_i and dB_i ⟂ B_i wherever the clamp is not active. A gradient that is None gives an
    output of size 0.
    """
    A, B = folded.A, folded.B
    dA = A.new_empty(0 if dA_hat is None else A.shape)
    dB = B.new_empty(0 if dB_hat is None else B.shape)
    return dA, dB, _acc(B, 0) if dB_hat is None else dB_hat.new_empty(1)


@op
def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """DoRA's norm ‖W_o + scale · B̂_o Â‖₂ of every row o, c = m / ‖·‖ (0 where the norm is 0), both
    [N] (acc), and if `scaled` c ⊙ W [N, K] in W's dtype; without a magnitude m the last two have
    size 0. B̂Â is never materialised whole. Of W, Â, B̂ and m of experts, [E, ...], all are [E, N];
    `scaled` is not for them.
    """
    rows = weight.shape[:-1]
    return (
        _acc(weight, *rows),
        _acc(weight, *((0,) if magnitude is None else rows)),
        weight.new_empty(weight.shape if scaled else 0),
    )


@op
def project(x: Tensor, A_hat: Tensor, masks: Masks) -> Tensor:
    """h = drop(x) Âᵀ → [T, R] in Â's dtype; reads x once for each mask."""
    return A_hat.new_empty((x.shape[0], A_hat.shape[0]))


@op
def expand(
    x: Tensor, weight: Tensor, bias: Tensor | None, term: RankTerm, rescaling: Rescaling
) -> tuple[Tensor, Tensor]:
    """y = c ⊙ u + bias with u = x Wᵀ + scale · h B̂ᵀ → y [T, N], and if `keep` (else size 0) the
    [T, N] tensor from which the same backend's expand_backward finds Σ_t dy ⊙ u: u, or x Wᵀ alone.

    dropout_p > 0 asks for PEFT's two-term DoRA: u is computed from drop(x), and
    y = (x − drop(x)) Wᵀ + c ⊙ u + bias.
    """
    T, N = x.shape[0], weight.shape[0]
    return x.new_empty((T, N)), x.new_empty((T, N) if rescaling.keep else 0)


@op
def expand_backward(
    dy: Tensor, term: TermGradients, rescaled: Rescaled, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """All that one read of dy gives: dv = dy (c ⊙ B̂) [T, R], dB̂ = scale · c ⊙ (dyᵀ h) [N, R]
    (acc), dm = Σ_t dy ⊙ u / divisor [N] (acc), 0 where the divisor is 0, and Σ_t dy [N] (acc). What
    is not asked for (B̂, h, kept None; need_bias False) has size 0. With what expand kept, h and B̂
    must be given.
    """
    h, B_hat, _ = term
    return (
        dy.new_empty(0) if B_hat is None else B_hat.new_empty((dy.shape[0], B_hat.shape[1])),
        _acc(dy, 0) if h is None else _acc(h, dy.shape[1], h.shape[1]),
        _acc(dy, 0 if rescaled.kept is None else dy.shape[1]),
        _acc(dy, dy.shape[1] if need_bias else 0),
    )


@op
def input_backward(dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks) -> tuple[Tensor, Tensor]:
    """dx = (dy ⊙ c) W + drop(scale · dv Â) → [T, K] in dy's dtype, accumulated in one buffer, and
    dÂ = scale · dvᵀ drop(x) of the first r columns of dv → [r, K] (acc); reads x once for each
    mask.

    Without a weight dx, without x dÂ has size 0. `two_term`:
    dx = dy W + drop((dy ⊙ (c − 1)) W + scale · dv Â), the gradient of PEFT's DoRA with dropout.
    """
    weight, x = frozen.weight, branch.x
    return (
        dy.new_empty(0 if weight is None else (dy.shape[0], weight.shape[1])),
        _acc(branch.dv, 0) if x is None else _acc(branch.dv, branch.r, x.shape[1]),
    )


@op
def weight_grad(dy: Tensor, x: Tensor, c: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """dW = c ⊙ (dyᵀ x) → [N, K] in dy's dtype, for a base that trains too.

    dropout_p > 0 (PEFT's two-term DoRA): dyᵀ (x − drop(x)) + c ⊙ (dyᵀ drop(x)).
    """
    return dy.new_empty((dy.shape[1], x.shape[1]))


@op
def stack_factors(factors: ExpertFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return a mixture's factors side by side, in `dtype`: [A; G; A⁰], of those that are given
    (size 0 if none is), and [B | −γ B⁰], [N, E r + E₀ r₀].
    """
    B = factors.B
    parts = [part for part in factors[:3] if part is not None]
    columns = sum(each.shape[0] * each.shape[2] for each in (B, factors.frozen_B) if each is not None)
    rows = (sum(part.shape[0] for part in parts), parts[0].shape[1]) if parts else 0
    return B.new_empty(rows, dtype=dtype), B.new_empty((B.shape[1], columns), dtype=dtype)


@op
def project_route(
    x: Tensor, A_hat: Tensor, masks: Masks, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return a mixture's project, and its gating in rank space: h = [u | logits | rest] as
    `project` finds it, then v = [w_te · s_e · u_te | rest] in h's dtype, w [T, E] (acc), and sums
    over tokens (acc): chosen f [E], mean probability P [E], mean logsumexp² [1].

    w is the softmax of the logits (`experts` columns), zero but for the `top_k` largest (the lowest
    index wins ties), with `renormalize` divided by its sum; or `gates` [T, E] (acc), then h has no
    logits, and the third result has size 0. Where w is 0, v is 0, whatever u.
    """
    T, columns, E = x.shape[0], A_hat.shape[0], gating.experts
    passed = gating.passed(columns, E if gates is None else 0)
    h, v = (A_hat.new_empty((T, width)) for width in (columns, E * gating.rank + passed))
    w = _acc(h, T, E) if gates is None else _acc(h, 0)
    return h, v, w, _acc(h, E), _acc(h, E), _acc(h, 1)


@op
def expand_route_backward(
    dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, gated: Gated, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Of a mixture, expand's backward and the gating's: with dv = dy B̂ → dh = [du | dlogits |
    drest] in h's layout and dtype, dB̂ = dyᵀ v [N, R] (acc; size 0 without v), Σ_t dy [N] (acc;
    size 0 unless `need_bias`), d gates [T, E] (acc; size 0 unless `given`), ds [E] (acc; size 0
    unless `need_scale`).

    An expert with w = 0 gets no du and no ds.
    """
    h, w = gated.h, gated.w
    return (
        torch.empty_like(h),
        _acc(dy, 0) if v is None else _acc(v, dy.shape[1], v.shape[1]),
        _acc(dy, dy.shape[1] if need_bias else 0),
        _acc(h, *w.shape) if gated.given else _acc(h, 0),
        _acc(h, gating.experts if gated.need_scale else 0),
    )


@op
def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Of the rows of every expert, y_e = x_e W_eᵀ + h_e B̂_eᵀ + bias_e and h_e = scale · drop(x_e)
    Â_eᵀ: → y [T, N], h [T, R] in Â's dtype (size 0 without factors).

    x [T, K] is sorted by expert: those of expert e end before row offsets[e] (int32 or int64, [E]).
    weight [E, N, K] in any float dtype, cast to x's; Â [E, R, K], B̂ [E, N, R], bias [E, N]. Rows
    behind the last offset belong to nobody: they are not read, and are 0 in y and h.
    """
    h = x.new_empty(0) if A_hat is None else A_hat.new_empty((x.shape[0], A_hat.shape[1]))
    return x.new_empty((x.shape[0], weight.shape[1])), h


@op
def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    need_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """With dv_e = scale · dy_e B̂_e: dx_e = dy_e W_e + drop(dv_e Â_e) → dx [T, K] in dy's dtype,
    dÂ_e = dv_eᵀ drop(x_e) [E, R, K], dB̂_e = dy_eᵀ h_e [E, N, R], Σ_t dy_e [E, N] (all acc); 0 for
    experts without rows.

    What is not asked for (weight, x, h None; need_bias False) has size 0. Without B̂ there is no
    low-rank branch; Â is needed for dx alone.
    """
    E, N = offsets.shape[0], dy.shape[1]
    return (
        dy.new_empty(0 if weight is None else (dy.shape[0], weight.shape[2])),
        _acc(dy, 0) if x is None or B_hat is None else _acc(B_hat, E, B_hat.shape[2], x.shape[1]),
        _acc(dy, 0) if h is None else _acc(h, E, h.shape[1], N).mT,
        _acc(dy, E if need_bias else 0, N),
    )


@op
def grouped_weight_grad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """dW_e = dy_eᵀ x_e → [E, N, K] in dy's dtype, 0 for experts without rows: for a base that
    trains too.
    """
    return dy.new_empty((offsets.shape[0], dy.shape[1], x.shape[1]))


def _reflected_acc(x: Tensor, u: Tensor, *shape: Any) -> Tensor:
    return u.new_empty(shape, dtype=accumulate_dtype(torch.promote_types(x.dtype, u.dtype)))


@op
def reflect(x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None) -> Tensor:
    """Every block of x's columns reflected, x − 2 (x·û) û, or with v x − (x·û) û + (x·v̂) v̂, +
    bias → [T, C] in x's dtype, from one read of x.

    u, v are [blocks, C / blocks], û = u / ‖u‖, computed in acc of the wider of x and u; a vector of
    length 0 does nothing.
    """
    return x.new_empty(x.shape)


@op
def reflect_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dx [T, C] in dy's dtype (size 0 unless `need_dx`), du and dv [blocks, C / blocks] (acc; dv of
    size 0 without v), from one read of dy and of x.

    du_i ⟂ u_i and dv_i ⟂ v_i; a vector of length 0 has gradient 0. dx alone is reflect of dy: a
    reflection is symmetric.
    """
    return (
        dy.new_empty(dy.shape if need_dx else 0),
        _reflected_acc(x, u, *u.shape),
        _reflected_acc(x, u, *(0,) if v is None else u.shape),
    )


@op
def dropout_mask(T: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the elements of a [T, K] input that dropout keeps, as the other ops decide them from
    the same seed.
    """
    return seed.new_empty((T, K), dtype=torch.bool)


NAMES = tuple(OPS)
"""Every op of the contract."""
