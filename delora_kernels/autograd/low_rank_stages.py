"""Every additive method as stages: which ops run in which order, and what is kept for backward.

    Â, B̂ = fold(A, B, ...)            h = drop(x) Âᵀ
    u = x Wᵀ + scale · h B̂ᵀ           y = c ⊙ u + bias

Kept: x (the caller's own tensor, shared with sibling layers; under autocast its cast copy, one a
layer), h [T, R], Â and B̂ where they are not A and B themselves, vectors, and for DoRA one [T, N]
tensor (or y itself on request); of these only what the wanted gradients need. Derivations:
docs/math.md.
"""

from typing import Any, NamedTuple

from torch import Tensor

from delora_kernels.autograd.function import Computed
from delora_kernels.bases.plain import PlainBase
from delora_kernels.call import Call, Options
from delora_kernels.op_arguments import (
    Branch,
    Folded,
    Frozen,
    Masks,
    RankTerm,
    Rescaled,
    Rescaling,
    Start,
    Strength,
    TermGradients,
)


class Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None = None
    weight: Tensor | None = None
    h: Tensor | None = None
    A_hat: Tensor | None = None
    B_hat: Tensor | None = None
    seed: Tensor | None = None
    c: Tensor | None = None
    kept: Tensor | None = None
    kept_divisor: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    lam: Tensor | None = None
    weight_norm: Tensor | None = None
    frozen_B: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def compute(call: Call, x: Tensor, need: Call, stages: Any) -> Computed:
    """y [T, N]; where nothing is wanted, nothing is kept."""
    o, u_dropout = call.options, _u_dropout(call.options, call.seed)
    weight = PlainBase(call.weight).dense(o.compute_dtype)
    a = b = norm = c = scaled = None
    if call.lam is None and call.A.dtype == call.B.dtype == o.rank_dtype:
        A_hat, B_hat = call.A, call.B
    else:
        strength = Strength(call.lam, call.weight_norm, o.eps)
        start = Start(call.frozen_A, call.frozen_B, call.frozen_lam)
        A_hat, B_hat, a, b = stages.fold(call.A, call.B, strength, start, o.rank_dtype)
    keep = bool(need.magnitude) and not o.save_output
    if call.magnitude is not None:
        wanted = not keep and not o.two_term and stages.wants_scaled(x, weight)
        norm, c, written = stages.row_norm(weight, A_hat, B_hat, o.scale, call.magnitude, wanted)
        scaled = written if wanted else None
    h = stages.project(x, A_hat, Masks(o.ranks, o.dropout_p, call.seed))
    rescaling = Rescaling(c, scaled, keep, *u_dropout)
    y, kept = stages.expand(x, weight, call.bias, RankTerm(h, B_hat, o.scale), rescaling)

    need_dv, need_dB_hat = need.x or need.A or need.magnitude, need.B or need.lam or need.magnitude
    folded = call.lam is not None
    kept, kept_divisor = (y, call.magnitude) if o.save_output else (kept, norm)
    saved = Saved(
        x=x if need.A or need.weight else None,
        weight=call.weight if need.x else None,
        h=h if need_dB_hat else None,
        A_hat=A_hat if need.x else None,
        B_hat=B_hat if need_dv else None,
        seed=call.seed,
        c=c,
        kept=kept if need.magnitude else None,
        kept_divisor=kept_divisor if need.magnitude else None,
        A=call.A if folded else None,
        B=call.B if folded else None,
        lam=call.lam,
        weight_norm=call.weight_norm,
        frozen_B=call.frozen_B if need.lam and call.frozen_lam is None else None,
        a=a,
        b=b,
    )
    return Computed((y,), saved, (call.A, call.B, call.magnitude, call.lam))


def _u_dropout(o: Options, seed: Tensor | None) -> tuple[float, Tensor | None]:
    """Return probability and seed of the dropout that u itself is computed with."""
    return (o.dropout_p[0], seed) if o.two_term else (0.0, None)


def gradients(o: Options, need: Call, saved: Any, stages: Any, dy: Tensor) -> dict[str, Tensor | None]:
    term = TermGradients(saved.h, saved.B_hat, o.scale)
    rescaled = Rescaled(saved.c, saved.kept, o.save_output, saved.kept_divisor)
    dv, dB_hat, dm, dy_sum = stages.expand_backward(dy, term, rescaled, bool(need.bias))
    grad, dA_hat = {"bias": dy_sum, "magnitude": dm}, None
    if need.x or need.A:
        weight = PlainBase(saved.weight).dense(o.compute_dtype) if need.x else None
        frozen = Frozen(weight, saved.c, o.two_term)
        branch = Branch(dv, saved.A_hat, saved.x if need.A else None, dv.shape[1] - o.frozen_rank, o.scale)
        grad["x"], dA_hat = stages.input_backward(dy, frozen, branch, Masks(o.ranks, o.dropout_p, saved.seed))
    if saved.lam is None:
        grad["A"], grad["B"] = dA_hat, dB_hat
    else:
        hats = (dA_hat if need.A else None, dB_hat if saved.h is not None else None)
        folded = Folded(saved.A, saved.B, saved.a, saved.b, saved.frozen_B)
        strength = Strength(saved.lam, saved.weight_norm, o.eps)
        grad["A"], grad["B"], dlam = stages.fold_backward(*hats, folded, strength)
        grad["lam"] = dlam.reshape(saved.lam.shape) if need.lam else None
    if need.weight:
        grad["weight"] = stages.weight_grad(dy, saved.x, saved.c, *_u_dropout(o, saved.seed))
    return grad
