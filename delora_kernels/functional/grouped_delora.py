"""grouped_delora_linear: DeLoRA on the linears of an expert model, each with a λ of its own."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.grouped import GroupedLinear
from delora_kernels.call import GroupedCall
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.functional.common import run
from delora_kernels.functional.grouped import check_grouped, grouped_call

_NAME = "grouped_delora_linear"


def grouped_delora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    weight_norm: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-4,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its frozen linear with a normalised low-rank update.

        y_e = x_e W_eᵀ + drop(x_e) Â_eᵀ B̂_eᵀ + bias_e,
        Â_e = diag(1/‖A_e,i‖) A_e diag(n_e),   B̂_e = B_e diag(λ_e / (r ‖B_e,i‖))

    That is `delora_linear` for each expert. The factors are normalised in plain torch: O(E r (K +
    N)), whatever the number of rows.

    Args:
        x, weight, A, B, offsets, bias, dropout_p, seed: as in `grouped_lora_linear`.
        lam: λ, `[E]`.
        weight_norm: n, a constant: `[E, K]` (‖W_e‖ of each input column) or `[E]` (one number for
            each expert).
        eps: Lower clamp of the norms, which then get no gradient (PEFT: 1e-4); 0: no clamp, and a
            factor of length 0 contributes nothing.

    Returns:
        y, `[T, N]`, in weight's dtype (autocast's dtype under autocast); 0 in rows of no expert.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
    eqs. 5-8, for each expert.
    """
    options: dict[str, Any] = {"eps": eps, "dropout_p": dropout_p, "seed": seed}
    call = grouped_delora_call(x, weight, A, B, lam, weight_norm, offsets, bias, **options)
    return run(GroupedLinear, call, x.shape)[0]


def grouped_delora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    lam: Any,
    weight_norm: Any,
    offsets: Any,
    bias: Any = None,
    *,
    eps: Any = 1e-4,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> GroupedCall:
    """Check the arguments of `grouped_delora_linear` and make its call, of normalised factors."""
    check_grouped(_NAME, x, weight, A, B, offsets, bias)
    E, _, K = weight.shape
    lam, n = checks.tensor(_NAME, "lam", lam), checks.tensor(_NAME, "weight_norm", weight_norm)
    checks.shape(_NAME, "lam", lam, (E,), "[E]", "one number for each expert")
    shape = (E,) if n.dim() == 1 else (E, K)
    checks.shape(_NAME, "weight_norm", n, shape, "[E, K] or [E]", "pass ‖W_e‖ of each input column, or of the whole")
    for name, value in (("lam", lam), ("weight_norm", n)):
        checks.same_device(_NAME, name, value, x)
    checks.no_transforms(_NAME, (lam, n), f"reference.{_NAME}")
    checks.constant(_NAME, "weight_norm", n)
    A, B = normalised(A, B, lam, n, checks.not_negative(_NAME, "eps", eps))
    return grouped_call(_NAME, x, weight, A, B, offsets, 1.0, bias, dropout_p=dropout_p, seed=seed)


def normalised(A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Â `[E, r, K]` and B̂ `[E, N, r]`, in the wider dtype of A and B, computed in float32 or wider;
    differentiable by autograd.
    """
    dtype = torch.promote_types(A.dtype, B.dtype)
    with torch.autocast(A.device.type, enabled=False):
        wide_A, wide_B, lam, n = (each.to(accumulate_dtype(dtype)) for each in (A, B, lam, weight_norm))
        n = n[:, None, None] if n.dim() == 1 else n[:, None]
        A_hat = _directions(wide_A, 2, eps) * n
        B_hat = _directions(wide_B, 1, eps) * (lam / A.shape[1])[:, None, None]
    return A_hat.to(dtype), B_hat.to(dtype)


def _directions(M: Tensor, dim: int, eps: float) -> Tensor:
    """M with its norms along `dim` divided out, each clamped at eps; one of 0 gives 0."""
    norm = torch.linalg.vector_norm(M, dim=dim, keepdim=True).clamp(min=eps)
    return M / norm.masked_fill(norm == 0, torch.inf)
