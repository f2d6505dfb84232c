"""grouped_dora_linear: DoRA on the linears of an expert model, each with magnitudes of its own."""

from typing import Any

from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.grouped import GroupedLinear
from delora_kernels.call import GroupedCall
from delora_kernels.functional.common import run
from delora_kernels.functional.grouped import check_grouped, grouped_call

_NAME = "grouped_dora_linear"


def grouped_dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its frozen linear, updated and rescaled by rows.

        y_e = c_e ⊙ (x_e W_eᵀ + scale · drop(x_e) A_eᵀ B_eᵀ) + bias_e,
        c_e = magnitude_e / ‖W_e + scale · B_e A_e‖ by rows, the norm detached

    That is `dora_linear` with dropout="branch" for each expert. The norms read every W_e once at
    each forward pass, also of experts without rows.

    Args:
        x, weight, A, B, offsets, scale, bias, dropout_p, seed: as in `grouped_lora_linear`.
        magnitude: m, `[E, N]`.

    Returns:
        y, `[T, N]`, in weight's dtype (autocast's dtype under autocast); 0 in rows of no expert.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5 and
    section 4.3, for each expert.
    """
    call = grouped_dora_call(x, weight, A, B, magnitude, offsets, scale, bias, dropout_p=dropout_p, seed=seed)
    return run(GroupedLinear, call, x.shape)[0]


def grouped_dora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    magnitude: Any,
    offsets: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> GroupedCall:
    """Check the arguments of `grouped_dora_linear` and make its call."""
    check_grouped(_NAME, x, weight, A, B, offsets, bias)
    magnitude = checks.tensor(_NAME, "magnitude", magnitude)
    remedy = "one number for each row of each expert's weight"
    checks.shape(_NAME, "magnitude", magnitude, tuple(weight.shape[:2]), "[E, N]", remedy)
    checks.same_device(_NAME, "magnitude", magnitude, x)
    checks.no_transforms(_NAME, (magnitude,), f"reference.{_NAME}")
    options = {"dropout_p": dropout_p, "seed": seed, "magnitude": magnitude}
    return grouped_call(_NAME, x, weight, A, B, offsets, scale, bias, **options)
