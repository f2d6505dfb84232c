"""DeLoRA: a low-rank update whose directions and strength are learned apart.

    W' = W + (λ / r) · Σᵢ b̄ᵢ āᵢᵀ diag(n),    b̄ᵢ = B[:, i] / ‖B[:, i]‖,    āᵢ = A[i, :] / ‖A[i, :]‖

Only the directions of A's rows and B's columns matter; λ alone bounds the strength: ‖W' − W‖_F ≤ λ
· max n.

Bini et al., "DeLoRA: Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
equation 8 (5: the normalisation; 9: the subtracted start; 15: the whole).

Three conventions let training start at W' = W; their gradients differ:

    PEFT              B starts at 0; norms are clamped from below, without gradient where the clamp
                      acts (eps=1e-4)
    authors' code     a frozen copy of the first A and B is subtracted, scaled by the live λ
                      (frozen_lam=None, eps=0)
    paper             a frozen copy of the first A and B is subtracted, scaled by the first λ
                      (frozen_lam=λ₀, eps=0)

and n is the norm of each input column of W (`[K]`: PEFT, authors' code) or one number for all (the
paper's ‖W‖).
"""

import torch
from torch import Tensor


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
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with a normalised low-rank update of bounded norm.

        y = x Wᵀ + (λ / r) · z Āᵀ B̄ᵀ − (λ₀ / r₀) · z Ā₀ᵀ B̄₀ᵀ + bias,    z = x ⊙ mask ⊙ n

    Ā has the rows A[i, :] / max(‖A[i, :]‖, eps), B̄ the columns B[:, i] / max(‖B[:, i]‖, eps); Ā₀,
    B̄₀ likewise. The term of the frozen start is there only if frozen_A and frozen_B are given.

    With eps = 0 a row of A or column of B that is exactly zero has direction 0: its rank
    contributes nothing to y and passes no gradient to A, B, λ or x.

    Args:
        x: `[..., K]`, any float dtype, which all tensors share.
        weight: W, `[N, K]`, nn.Linear's layout.
        A: `[r, K]`.
        B: `[N, r]`.
        lam: λ; a number, or a 0-d or `[1]` tensor.
        weight_norm: n, a constant: `[K]`, or a number or 0-d tensor for all columns.
        bias: `[N]` or None.
        frozen_A: A₀, `[r₀, K]`, a constant, or None: nothing is subtracted.
        frozen_B: B₀, `[N, r₀]`, a constant, or None.
        frozen_lam: λ₀, a constant; None: the live λ, which then gets a gradient from the
            difference.
        eps: Lower clamp of the norms; a clamped norm is a constant. 0: no clamp.
        dropout_mask: `[T, K]` with entries 0 or 1 / (1 − p), on the input of the low-rank branch;
            None: no dropout.

    Returns:
        y, `[..., N]`.

    Source: arXiv:2503.18225, equations 5, 8, 9 and 15.
    """
    dropped = x if dropout_mask is None else x * dropout_mask.reshape(x.shape)
    scaled = (dropped * _constant(weight_norm)).to(A.dtype)
    h = lam / A.shape[0] * (scaled @ _directions(A, 1, eps).T)
    y = x @ weight.T + h.to(B.dtype) @ _directions(B, 0, eps).T
    if frozen_A is not None and frozen_B is not None:
        A0, B0 = _directions(frozen_A.detach(), 1, eps), _directions(frozen_B.detach(), 0, eps)
        lam0 = lam if frozen_lam is None else _constant(frozen_lam)
        y = y - (lam0 / A0.shape[0] * (scaled @ A0.T)).to(B0.dtype) @ B0.T
    return y if bias is None else y + bias


def delora_factors(
    A: Tensor, B: Tensor, lam: Tensor | float, weight_norm: Tensor | float, *, eps: float = 1e-4
) -> tuple[Tensor, Tensor]:
    """Return the update as a plain low-rank pair: y = x Wᵀ + z Âᵀ B̂ᵀ + bias, z = x ⊙ mask.

        Â = Ā diag(n),   B̂ = (λ / r) B̄

    Args:
        A, B, lam, weight_norm, eps: as in `delora_linear`.

    Returns:
        Â, `[r, K]`, and B̂, `[N, r]`.

    Source: arXiv:2503.18225, equations 5 and 8.
    """
    return _directions(A, 1, eps) * _constant(weight_norm), _directions(B, 0, eps) * (lam / A.shape[0])


def delora_weight(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor | float,
    weight_norm: Tensor | float,
    *,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | float | None = None,
    eps: float = 1e-4,
) -> Tensor:
    """Return the matrix `delora_linear` applies when nothing is dropped.

        W' = W + [ (λ / r) B Ξ A − (λ₀ / r₀) B₀ Ξ₀ A₀ ] diag(n),
        Ξ = diag(1 / (‖A[i, :]‖ · ‖B[:, i]‖))

    Args:
        weight, A, B, lam, weight_norm, frozen_A, frozen_B, frozen_lam, eps: as in `delora_linear`.

    Returns:
        W', `[N, K]`.

    Source: arXiv:2503.18225, equations 8 and 9.
    """
    delta = _bounded_product(A, B, lam, eps)
    if frozen_A is not None and frozen_B is not None:
        lam0 = lam if frozen_lam is None else _constant(frozen_lam)
        delta = delta - _bounded_product(frozen_A.detach(), frozen_B.detach(), lam0, eps)
    return weight + delta * _constant(weight_norm)


def _directions(M: Tensor, dim: int, eps: float) -> Tensor:
    """M with its norms along `dim` divided out, each clamped at eps; one that is 0 after that
    counts as ∞.
    """
    norm = M.norm(dim=dim, keepdim=True).clamp(min=eps)
    return M / torch.where(norm == 0, torch.inf, norm)


def _bounded_product(A: Tensor, B: Tensor, lam: Tensor | float, eps: float) -> Tensor:
    """(λ / r) B Ξ A, `[N, K]`."""
    lengths = A.norm(dim=1).clamp(min=eps) * B.norm(dim=0).clamp(min=eps)
    xi = torch.where(lengths == 0, 0.0, 1 / torch.where(lengths == 0, 1.0, lengths))
    return lam / A.shape[0] * B @ torch.diag(xi) @ A


def _constant(value: Tensor | float) -> Tensor | float:
    return value.detach() if isinstance(value, Tensor) else value
