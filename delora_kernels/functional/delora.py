"""delora_linear and delora_factors: DeLoRA, a normalised low-rank update of learned strength."""

from typing import Any

from torch import Tensor

from delora_kernels import checks, dispatch
from delora_kernels.autograd.fold import Fold
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.call import Call
from delora_kernels.dispatch import requested
from delora_kernels.functional import common
from delora_kernels.functional.common import exporting, low_rank_call, run
from delora_kernels.functional.planned import at_a_glance, learn_glance
from delora_kernels.op_arguments import Start, Strength


def delora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor | float,
    weight_norm: Tensor | float,
    bias: Tensor | None = None,
    *,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | float | None = None,
    eps: float = 1e-4,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with a normalised low-rank update of bounded norm: angle and strength
    learn apart.

        y = x Wᵀ + drop(x) Âᵀ B̂ᵀ + bias,   Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖))

    With a frozen start (A₀, B₀) the pair's own update, scaled by λ₀, is subtracted. ‖ΔW‖_F ≤ λ max
    n (PEFT's form).

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`; only its rows' directions matter.
        B: `[N, r]`; only its columns' directions matter.
        lam: λ, the strength; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, one value for each input column (PEFT and the authors'
            code), or a number or 0-d tensor (the paper's ‖W‖).
        bias: `[N]` or None.
        frozen_A: A₀, `[r₀, K]`, a constant, or None.
        frozen_B: B₀, `[N, r₀]`, a constant, or None.
        frozen_lam: λ₀ of the frozen start (the paper), or None: the live λ (the authors' code).
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a
            factor of length 0 contributes nothing.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1).
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask; None draws from
            torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
    eqs. 5-9.
    """
    key = None
    if frozen_A is frozen_B is frozen_lam is None and (
        dispatch._requested is not None or not getattr(x, "is_cpu", True)
    ):
        key, y = at_a_glance("delora_linear", (x, weight, bias, A, B, None, lam, weight_norm), dropout_p, eps)
        if y is not None:
            return y
    call = delora_call(
        x,
        weight,
        A,
        B,
        lam,
        weight_norm,
        bias,
        frozen_A=frozen_A,
        frozen_B=frozen_B,
        frozen_lam=frozen_lam,
        eps=eps,
        dropout_p=dropout_p,
        seed=seed,
    )
    y = run(AdaptedLinear, call, x.shape)[0]
    if key is not None:
        learn_glance(key, call)
    return y


def delora_factors(
    A: Tensor, B: Tensor, lam: Tensor | float, weight_norm: Tensor | float, *, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """DeLoRA's normalised update as a plain low-rank pair, which `lora_linear` takes with scale 1.

        Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖)),   ΔW = B̂ Â

    Args:
        A: `[r, K]`.
        B: `[N, r]`.
        lam: λ; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, or a number or 0-d tensor.
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a
            factor of length 0 contributes nothing.

    Returns:
        Â `[r, K]` and B̂ `[N, r]`, in the wider dtype of A and B, computed in float32 or wider;
        differentiable once.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
    eqs. 5-8.
    """
    lam, weight_norm, eps = factors_call(A, B, lam, weight_norm, eps)
    if exporting():
        return common.plain_torch.factors(A, B, lam, weight_norm, eps)
    A_hat, B_hat = Fold.apply(A, B, lam, weight_norm, eps, requested() or "eager")
    return A_hat, B_hat


def delora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    lam: Any,
    weight_norm: Any,
    bias: Any = None,
    *,
    frozen_A: Any = None,
    frozen_B: Any = None,
    frozen_lam: Any = None,
    eps: Any = 1e-4,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Call:
    """Check the arguments of `delora_linear` and make its call."""
    name = "delora_linear"
    checks.low_rank(name, x, weight, bias, A, B, lam, weight_norm, frozen_A, frozen_B, frozen_lam)
    strength = Strength(*_delora_constants(name, A, lam, weight_norm, eps))
    if (frozen_A is None) != (frozen_B is None):
        missing = "frozen_A" if frozen_A is None else "frozen_B"
        raise checks.fail(
            ValueError, name, missing, "a tensor", "None", "a frozen start needs both frozen_A and frozen_B"
        )
    if frozen_A is not None:
        checks.factors(name, x, weight, frozen_A, frozen_B, ("frozen_A", "frozen_B"))
        checks.constant(name, "frozen_A", frozen_A)
        checks.constant(name, "frozen_B", frozen_B)
    if frozen_lam is not None:
        if frozen_A is None:
            raise checks.fail(
                ValueError, name, "frozen_lam", "None", "a value", "it scales frozen_A and frozen_B: pass them"
            )
        frozen_lam = checks.scalar_tensor(name, "frozen_lam", frozen_lam, x)
        checks.constant(name, "frozen_lam", frozen_lam)
    dropout_p, start = checks.probabilities(name, dropout_p, ()), Start(frozen_A, frozen_B, frozen_lam)
    return low_rank_call(name, x, weight, bias, A, B, strength=strength, start=start, dropout_p=dropout_p, seed=seed)


def factors_call(A: Any, B: Any, lam: Any, weight_norm: Any, eps: Any) -> tuple[Tensor, Tensor, float]:
    """Check the arguments of `delora_factors` and return λ, n and eps."""
    name = "delora_factors"
    checks.no_transforms(name, (A, B, lam, weight_norm), "reference.delora_weight")
    checks.pair(name, A, B)
    checks.same_device(name, "B", B, A)
    return _delora_constants(name, A, lam, weight_norm, eps)


def _delora_constants(name: str, A: Tensor, lam: Any, weight_norm: Any, eps: Any) -> tuple[Tensor, Tensor, float]:
    lam = checks.scalar_tensor(name, "lam", lam, A)
    if isinstance(weight_norm, Tensor) and weight_norm.dim() > 0:
        weight_norm = checks.tensor(name, "weight_norm", weight_norm)
        remedy = "pass ‖W‖ of each input column, or one number"
        checks.shape(name, "weight_norm", weight_norm, (A.shape[1],), "[K]", remedy)
        checks.same_device(name, "weight_norm", weight_norm, A)
    else:
        weight_norm = checks.scalar_tensor(name, "weight_norm", weight_norm, A)
    checks.constant(name, "weight_norm", weight_norm)
    return lam, weight_norm, checks.not_negative(name, "eps", eps)
