"""DeLoRA's fold and its inverse for gradients, in plain torch: O(R(K + N)), never token-sized."""

import torch
from torch import Tensor

from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import Folded, Start, Strength


def fold(
    A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Both pairs normalised in float32, then stacked and cast once, the frozen start with the sign
    it is given.
    """
    acc, (lam, weight_norm, eps), (frozen_A, frozen_B, frozen_lam) = accumulate_dtype(dtype), strength, start
    if lam is None or weight_norm is None:
        nothing = A.new_empty(0, dtype=acc)
        return A.to(dtype, copy=True), B.to(dtype, copy=True), nothing, nothing.clone()
    a, b = _norms(A, B, acc)
    A_hat, B_hat = folded(A, B, a, b, lam, weight_norm, eps)
    if frozen_A is not None and frozen_B is not None:
        a0, b0 = _norms(frozen_A, frozen_B, acc)
        A0_hat, B0_hat = folded(frozen_A, frozen_B, a0, b0, lam if frozen_lam is None else frozen_lam, weight_norm, eps)
        A_hat, B_hat = torch.cat([A_hat, A0_hat]), torch.cat([B_hat, B0_hat.neg_()], dim=1)
        a, b = torch.cat([a, a0]), torch.cat([b, b0])
    return A_hat.to(dtype), B_hat.to(dtype), a, b


def _norms(A: Tensor, B: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    return torch.linalg.vector_norm(A.to(acc), dim=1), torch.linalg.vector_norm(B.to(acc), dim=0)


def folded(
    A: Tensor, B: Tensor, a: Tensor, b: Tensor, lam: Tensor, weight_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Â, B̂ of a pair whose norms are known, in the norms' dtype."""
    A_hat = (A * _reciprocal(a, eps)[:, None]).mul_(weight_norm)
    return A_hat, B * (lam.to(b.dtype).reshape(()) / A.shape[0] * _reciprocal(b, eps))


def _reciprocal(norm: Tensor, eps: float) -> Tensor:
    """1 / max(norm, eps); 0 for a norm of 0 without a clamp: a vector of length 0 has no
    direction.
    """
    if eps > 0:
        return norm.clamp(min=eps).reciprocal_()
    return torch.where(norm == 0, torch.zeros_like(norm), norm.reciprocal())


def fold_backward(
    dA_hat: Tensor | None, dB_hat: Tensor | None, folded: Folded, strength: Strength
) -> tuple[Tensor, Tensor, Tensor]:
    """dÂ → dA and dB̂ → dB, dλ; λ divides nothing, so λ = 0 is a value like any other."""
    (A, B, a, b, frozen_B), (lam, weight_norm, eps) = folded, strength
    assert lam is not None
    assert weight_norm is not None
    r = A.shape[0]
    dA, dB, dlam = A.new_empty(0), B.new_empty(0), b.new_empty(0)
    if dA_hat is not None:
        dA, _ = _normalise_backward(dA_hat * weight_norm, A, a.narrow(0, 0, r), eps, dim=1)
    if dB_hat is not None:
        dB, along = _normalise_backward(dB_hat.narrow(1, 0, r), B, b.narrow(0, 0, r), eps, dim=0)
        dB *= lam.to(b.dtype) / r
        dlam = along.sum() / r
        if frozen_B is not None:
            dlam -= frozen_dlam(dB_hat, frozen_B, b, eps)
    return dA.to(A.dtype), dB.to(B.dtype), dlam.reshape(-1)


def frozen_dlam(dB_hat: Tensor, frozen_B: Tensor, b: Tensor, eps: float) -> Tensor:
    """Return what a frozen start scaled by the live λ takes off dλ; its columns stand behind the
    trained ones in dB̂ and b.
    """
    r0 = frozen_B.shape[1]
    return (dB_hat[:, -r0:] * frozen_B * _reciprocal(b[-r0:], eps)).sum() / r0


def _normalise_backward(grad: Tensor, factor: Tensor, norm: Tensor, eps: float, dim: int) -> tuple[Tensor, Tensor]:
    """Gradient of factor / max(norm, eps) along `dim`, and ⟨grad, that unit vector⟩.

    Without an active clamp the part of the gradient along the factor drops out.
    """
    inverse = _reciprocal(norm, eps)
    along = (grad * factor).sum(dim).mul_(inverse)
    remaining = (along * inverse).mul_(inverse).mul_(norm >= eps)
    return (grad * inverse.unsqueeze(dim)).addcmul_(factor, remaining.unsqueeze(dim), value=-1), along
