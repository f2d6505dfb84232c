"""dora_linear: DoRA, a low-rank update whose rows are rescaled to learned magnitudes."""

from typing import Any

from torch import Tensor

from delora_kernels import checks, dispatch
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.call import Call
from delora_kernels.functional.common import low_rank_call, run
from delora_kernels.functional.planned import at_a_glance, learn_glance


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
    dropout: str = "peft",
    saved: str = "private",
) -> Tensor:
    """Apply a frozen linear whose updated weight rows are rescaled to learned magnitudes.

        y = c ⊙ (x Wᵀ + scale · x Aᵀ Bᵀ) + bias,
        c = magnitude / ‖W + scale · B A‖ by rows, the norm detached

    A row of zero norm has c = 0: its output is the bias and no gradient passes through it.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        magnitude: m, `[N]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        dropout_p: Probability of dropping an element, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from
            torch's generator.
        dropout: "peft": with x' = drop(x), y = (x − x') Wᵀ + c ⊙ (x' Wᵀ + scale · x' Aᵀ Bᵀ) + bias,
            two frozen GEMMs. "branch": only the low-rank branch sees drop(x), one frozen GEMM.
        saved: "private": backward keeps a `[T, N]` tensor of its own. "output": it keeps y, which
            costs nothing where the consumer keeps y too; y must then not be modified in place
            (autograd refuses), there may be no bias and no two-term dropout, and an exactly zero
            magnitude gets no gradient.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5 and
    section 4.3.
    """
    key = None
    if dropout == "peft" and saved == "private" and (dispatch._requested is not None or not getattr(x, "is_cpu", True)):
        key, y = at_a_glance("dora_linear", (x, weight, bias, A, B, magnitude), dropout_p, scale)
        if y is not None:
            return y
    call = dora_call(
        x, weight, A, B, magnitude, scale, bias, dropout_p=dropout_p, seed=seed, dropout=dropout, saved=saved
    )
    y = run(AdaptedLinear, call, x.shape)[0]
    if key is not None:
        learn_glance(key, call)
    return y


def dora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    magnitude: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    dropout_p: Any = 0.0,
    seed: Any = None,
    dropout: Any = "peft",
    saved: Any = "private",
) -> Call:
    """Check the arguments of `dora_linear` and make its call."""
    name = "dora_linear"
    checks.low_rank(name, x, weight, bias, A, B, magnitude)
    magnitude = checks.tensor(name, "magnitude", magnitude)
    checks.shape(name, "magnitude", magnitude, (weight.shape[0],), "[N]", "pass one value for each row of weight")
    checks.same_device(name, "magnitude", magnitude, x)
    two_term = checks.option(name, "dropout", dropout, ("peft", "branch")) == "peft"
    save_output = checks.option(name, "saved", saved, ("private", "output")) == "output"
    two_term = two_term and checks.probability(name, dropout_p) > 0
    if save_output and (bias is not None or two_term):
        got = "a bias" if bias is not None else "dropout='peft' with dropout_p > 0"
        raise checks.fail(
            ValueError, name, "saved", "'private' here", f"'output' with {got}", "y does not hold c ⊙ u then"
        )
    scale = checks.number(name, "scale", scale)
    dropout_p = checks.probabilities(name, dropout_p, ())
    return low_rank_call(
        name,
        x,
        weight,
        bias,
        A,
        B,
        magnitude=magnitude,
        scale=scale,
        dropout_p=dropout_p,
        seed=seed,
        two_term=two_term,
        save_output=save_output,
    )
