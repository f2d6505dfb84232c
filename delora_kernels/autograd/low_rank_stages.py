"""Every additive method as stages: which ops run in which order, and what is kept for backward.

    Â, B̂ = fold(A, B, ...)            h = drop(x) Âᵀ
    u = x Wᵀ + scale · h B̂ᵀ           y = c ⊙ u + bias

Kept: x (the caller's own tensor, shared with sibling layers; under autocast its cast copy, one a
layer), h [T, R], vectors, and for DoRA one [T, N] tensor (or y itself on request); of these only
what the wanted gradients need. Â and B̂, where they are not A and B themselves, are folded again,
or kept where the backend would rather. Derivations: docs/math.md.
"""

from typing import Any, NamedTuple

from torch import Tensor

from delora_kernels.autograd.function import Computed
from delora_kernels.autograd.input_gradient import input_gradient
from delora_kernels.bases.plain import dense
from delora_kernels.call import Call, Options
from delora_kernels.op_arguments import (
    Branch,
    Folded,
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
    weight: Any = None
    h: Tensor | None = None
    A: Tensor | None = None
    B: Tensor | None = None
    A_hat: Tensor | None = None
    B_hat: Tensor | None = None
    seed: Tensor | None = None
    c: Tensor | None = None
    kept: Tensor | None = None
    kept_divisor: Tensor | None = None
    lam: Tensor | None = None
    weight_norm: Tensor | None = None
    frozen_A: Tensor | None = None
    frozen_B: Tensor | None = None
    frozen_lam: Tensor | None = None
    a: Tensor | None = None
    b: Tensor | None = None


def compute(call: Call, x: Tensor, need: Call, stages: Any, found: Any = None) -> Computed:
    """y [T, N]; where nothing is wanted, nothing is kept.

    Args:
        call, x, need, stages: as `differentiable` says.
        found: What `folded_of` gives, and h, where x has been read for it already.
    """
    o, u_dropout, tokens = call.options, _u_dropout(call.options, call.seed), rows(x)
    weight = dense(call.weight, o.compute_dtype)
    norm = c = scaled = None
    A_hat, B_hat, a, b, h = found or (*folded_of(call, o, stages), None)
    keep = bool(need.magnitude) and not o.save_output
    if call.magnitude is not None:
        wanted = not keep and not o.two_term and stages.wants_scaled(tokens, weight)
        norm, c, written = stages.row_norm(weight, A_hat, B_hat, o.scale, call.magnitude, wanted)
        scaled = written if wanted else None
    if h is None:
        h = stages.project(tokens, A_hat, Masks(o.ranks, o.dropout_p, call.seed))
    rescaling = Rescaling(c, scaled, keep, *u_dropout)
    y, kept = stages.expand(tokens, weight, call.bias, RankTerm(h, B_hat, o.scale), rescaling)

    need_dv, need_dB_hat = need.x or need.A or need.magnitude, need.B or need.lam or need.magnitude
    folds = _folds(call, o)
    keeps = folds and bool(getattr(stages, "keeps_folded", False))
    again = folds and (call.lam is not None or not keeps)
    kept, kept_divisor = (y, call.magnitude) if o.save_output else (kept, norm)
    saved = Saved(
        x=x if need.A or need.weight else None,
        weight=call.weight if need.x else None,
        h=h if need_dB_hat else None,
        A=call.A if again or (need.x and not folds) else None,
        B=call.B if again or (need_dv and not folds) else None,
        A_hat=A_hat if keeps and need.x else None,
        B_hat=B_hat if keeps and need_dv else None,
        seed=call.seed,
        c=c,
        kept=kept if need.magnitude else None,
        kept_divisor=kept_divisor if need.magnitude else None,
        lam=call.lam,
        weight_norm=call.weight_norm,
        frozen_A=call.frozen_A,
        frozen_B=call.frozen_B,
        frozen_lam=call.frozen_lam,
        a=a,
        b=b,
    )
    return Computed((y,), saved, (call.A, call.B, call.magnitude, call.lam))


def rows(x: Tensor) -> Tensor:
    """x [..., K] as [T, K]."""
    return x if x.dim() == 2 else x.flatten(0, -2)


def _folds(of: Any, o: Options) -> bool:
    """Whether Â and B̂ are not A and B themselves."""
    if of.lam is not None:
        return True
    return any([each is not None and each.dtype != o.rank_dtype for each in (of.A, of.B)])  # noqa: C419, for torch 2.7


def folded_of(of: Any, o: Options, stages: Any) -> tuple[Any, Any, Tensor | None, Tensor | None]:
    """Â, B̂ and their norms of a call, or of what is kept of it: A and B themselves where nothing is
    to be done.
    """
    if not _folds(of, o):
        return of.A, of.B, None, None
    start = Start(of.frozen_A, of.frozen_B, of.frozen_lam)
    found: tuple[Any, ...] = stages.fold(of.A, of.B, Strength(of.lam, of.weight_norm, o.eps), start, o.rank_dtype)
    return found[0], found[1], found[2], found[3]


def _u_dropout(o: Options, seed: Tensor | None) -> tuple[float, Tensor | None]:
    """Return probability and seed of the dropout that u itself is computed with."""
    return (o.dropout_p[0], seed) if o.two_term else (0.0, None)


def gradients(o: Options, need: Call, saved: Any, stages: Any, dy: Tensor) -> dict[str, Tensor | None]:
    """Return field of `Call` → its gradient, of all that `need` names: dx [T, K], dW [N, K], dA
    [r, K], dB [N, r], dm and dbias [N], dλ as λ, from dy [T, N] and what `compute` kept.
    """
    grad, dv, A_hat, dB_hat = gradients_of_dy(o, need, saved, stages, dy)
    dA_hat = None
    if need.x or need.A:
        branch = Branch(
            dv, A_hat if need.x else None, rows(saved.x) if need.A else None, dv.shape[1] - o.frozen_rank, o.scale
        )
        masks, weights = Masks(o.ranks, o.dropout_p, saved.seed), (saved.weight,) if need.x else ()
        how = (o.compute_dtype, branch, masks, saved.c, o.two_term)
        grad["x"], dA_hat = input_gradient(stages, (dy,), weights, *how)
    grad.update(gradients_of_factors(o, need, saved, stages, dA_hat, dB_hat))
    if need.weight:
        grad["weight"] = stages.weight_grad(dy, rows(saved.x), saved.c, *_u_dropout(o, saved.seed))
    return grad


def gradients_of_dy(
    o: Options, need: Call, saved: Any, stages: Any, dy: Tensor
) -> tuple[dict[str, Tensor | None], Tensor, Tensor | None, Tensor]:
    """Read dy once: dbias and dm by name, dv [T, R], Â for dx, dB̂ [N, R]."""
    A_hat, B_hat = saved.A_hat, saved.B_hat
    if B_hat is None and (need.x or need.A or need.magnitude):
        A_hat, B_hat, _, _ = folded_of(saved, o, stages)
    term = TermGradients(saved.h, B_hat, o.scale)
    rescaled = Rescaled(saved.c, saved.kept, o.save_output, saved.kept_divisor)
    dv, dB_hat, dm, dy_sum = stages.expand_backward(dy, term, rescaled, bool(need.bias))
    return {"bias": dy_sum, "magnitude": dm}, dv, A_hat, dB_hat


def gradients_of_factors(
    o: Options, need: Call, saved: Any, stages: Any, dA_hat: Tensor | None, dB_hat: Tensor
) -> dict[str, Tensor | None]:
    """dÂ, dB̂ → dA, dB, dλ by name."""
    if saved.lam is None:
        return {"A": dA_hat, "B": dB_hat}
    hats = (dA_hat if need.A else None, dB_hat if saved.h is not None else None)
    live_start = saved.frozen_B if need.lam and saved.frozen_lam is None else None
    folded = Folded(saved.A, saved.B, saved.a, saved.b, live_start)
    strength = Strength(saved.lam, saved.weight_norm, o.eps)
    dA, dB, dlam = stages.fold_backward(*hats, folded, strength)
    return {"A": dA, "B": dB, "lam": dlam.reshape(saved.lam.shape) if need.lam else None}
