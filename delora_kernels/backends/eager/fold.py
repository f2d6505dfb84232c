"""DeLoRA's fold and its inverse for gradients, in plain torch: O(R(K + N)), never token-sized."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

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
    if dtype != acc:
        A_hat, B_hat = A_hat.to(dtype), B_hat.to(dtype)
    return A_hat, B_hat, a, b


def _norms(A: Tensor, B: Tensor, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    if A.dtype != acc or B.dtype != acc:
        A, B = A.to(acc), B.to(acc)
    return torch.linalg.vector_norm(A, dim=1), torch.linalg.vector_norm(B, dim=0)


def folded(
    A: Tensor, B: Tensor, a: Tensor, b: Tensor, lam: Tensor, weight_norm: Tensor, eps: float
) -> tuple[Tensor, Tensor]:
    """Â, B̂ of a pair whose norms are known, in the norms' dtype."""
    A_hat = (A / _clamped(a, eps).unsqueeze(1)).mul_(weight_norm)
    return A_hat, B * (_per_rank(lam, b, len(A)) / _clamped(b, eps))


def _per_rank(lam: Tensor, norm: Tensor, r: int) -> Tensor:
    """λ / r in the dtype of a norm, without dimensions."""
    return (lam if lam.dtype == norm.dtype else lam.to(norm.dtype)).reshape(()) / r


def _clamped(norm: Tensor, eps: float) -> Tensor:
    """max(norm, eps); ∞ for a norm of 0 without a clamp: a vector of length 0 has no direction."""
    return norm.clamp_min(eps) if eps > 0 else norm.masked_fill(norm == 0, math.inf)


class Pair(NamedTuple):
    """A pair folded again for its backward pass, and what `unfold` takes besides.

    Args:
        A_hat, B_hat: Â [r, K], B̂ [N, r].
        lengths: What A's rows and B's columns were divided by [2, r].
        unclamped: Where that is their norm [2, r].
        strength: λ / r.
        factor: B̂ over B [r].
        column: A over Â, but for W's norms [r, 1].
    """

    A_hat: Tensor
    B_hat: Tensor
    lengths: Tensor
    unclamped: Tensor
    strength: Tensor
    factor: Tensor
    column: Tensor


def refolded(A: Tensor, B: Tensor, a: Tensor, b: Tensor, lam: Tensor, weight_norm: Tensor, eps: float) -> Pair:
    """Return the pair again, of one dtype, from the norms that were kept."""
    norms = torch.stack((a, b))
    lengths, strength = _clamped(norms, eps), _per_rank(lam, b, len(a))
    length_a, length_b = lengths.unbind()
    column, factor = length_a.unsqueeze(1), strength / length_b
    return Pair((A / column).mul_(weight_norm), B * factor, lengths, norms >= eps, strength, factor, column)


def unfold(
    dA_hat: Tensor, dB_hat: Tensor, A: Tensor, B: Tensor, weight_norm: Tensor, pair: Pair
) -> tuple[Tensor, Tensor, Tensor]:
    """dA, dB in the memory of dÂ and dB̂, and dλ, of a pair that one h = x Âᵀ went through.

    There ⟨dÂ, Â⟩ = ⟨dv, h⟩ = ⟨dB̂, B̂⟩, rank by rank, so that only one of them is summed.
    """
    _, _, lengths, unclamped, strength, factor, column = pair
    along = (dB_hat * B).sum(0).div_(lengths[1])
    dlam = along.mean()
    share_a, share_b = (along.mul_(strength) / lengths).div_(lengths).mul_(unclamped).unbind()
    dB = dB_hat.mul_(factor).addcmul_(B, share_b, value=-1)
    dA = dA_hat.mul_(weight_norm).div_(column).addcmul_(A, share_a.unsqueeze(1), value=-1)
    return dA, dB, dlam


class Stack(NamedTuple):
    """Factors of several layers of one x, of one dtype, side by side.

    Args:
        A_hat: Â of all [R, K], of LoRA A itself.
        members: (A, B, λ, the weight norms) of each, λ None for LoRA.
        ranks: Of each layer.
        eps: DeLoRA's ε.
        norms: Of DeLoRA's A by rows and B by columns [2, R]; None without DeLoRA among them, as all
            that follows.
        lengths: What they were divided by [2, R], 1 for LoRA.
        strength: λ / r [R], 1 for LoRA.
        factor: B̂ over B [R], which h and dv are multiplied by in place of B.
    """

    A_hat: Tensor
    members: Sequence[tuple[Any, ...]]
    ranks: list[int]
    eps: float
    norms: Any = None
    lengths: Any = None
    strength: Any = None
    factor: Tensor | None = None


def stack_of(members: Sequence[tuple[Any, ...]], eps: float, norms: Tensor | None = None) -> Stack:
    """Return the factors of several layers side by side, DeLoRA's folded: what is done to all of
    them alike in one call.

    Args:
        members, eps: See `Stack`.
        norms: What an earlier stack of theirs had.
    """
    A_hat, ranks = torch.cat([member[0] for member in members]), [member[0].shape[0] for member in members]
    if all([lam is None for _, _, lam, _ in members]):  # noqa: C419, for torch 2.7
        return Stack(A_hat, members, ranks, eps)
    if norms is None:
        norms = A_hat.new_ones((2, len(A_hat)))
        torch.linalg.vector_norm(A_hat, dim=1, out=norms[0])
        for (_, B, lam, _), own in zip(members, norms[1].split_with_sizes(ranks), strict=True):
            if lam is not None:
                torch.linalg.vector_norm(B, dim=0, out=own)
    lengths = _clamped(norms, eps)
    for (_, _, lam, _), own in zip(members, lengths.split_with_sizes(ranks, 1), strict=True):
        if lam is None:
            own.fill_(1)
    A_hat.div_(lengths[0].unsqueeze(1))
    each = []
    for (_, _, lam, weight_norm), r, own in zip(members, ranks, A_hat.split_with_sizes(ranks), strict=True):
        if lam is None:
            each.append(norms.new_ones(r))
        else:
            own.mul_(weight_norm)
            each.append((lam.reshape(1) / r).expand(r))
    strength = torch.cat(each)
    return Stack(A_hat, members, ranks, eps, norms, lengths, strength, strength / lengths[1])


def unfold_stack(dA_hat: Tensor, dBs: Sequence[Tensor], along: Tensor, stack: Stack) -> list[Tensor]:
    """dA in the memory of dÂ, dB in that of B's own gradient, and dλ of each layer.

    Args:
        dA_hat: [R, K].
        dBs: dyᵀ (factor ⊙ h) of each, [N, r].
        along: ⟨dy B, h⟩ [R], which is ⟨dB̂, B⟩, rank by rank.
        stack: What it is of.
    """
    ranks, lengths = stack.ranks, stack.lengths
    along = along.div_(lengths[1])
    dlams = [own.mean() for own in along.split_with_sizes(ranks)]
    shares = (along.mul_(stack.strength) / lengths).div_(lengths).mul_(stack.norms >= stack.eps)
    dA_hat.div_(lengths[0].unsqueeze(1))
    parts = zip(stack.members, dA_hat.split_with_sizes(ranks), dBs, shares.split_with_sizes(ranks, 1), strict=True)
    for (A, B, lam, weight_norm), dA, dB, own in parts:
        if lam is not None:
            dA.mul_(weight_norm).addcmul_(A, own[0].unsqueeze(1), value=-1)
            dB.addcmul_(B, own[1], value=-1)
    return dlams


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
    return (dB_hat[:, -r0:] * frozen_B / _clamped(b[-r0:], eps)).sum() / r0


def _normalise_backward(grad: Tensor, factor: Tensor, norm: Tensor, eps: float, dim: int) -> tuple[Tensor, Tensor]:
    """Gradient of factor / max(norm, eps) along `dim`, and ⟨grad, that unit vector⟩.

    Without an active clamp the part of the gradient along the factor drops out.
    """
    inverse = _clamped(norm, eps).reciprocal_()
    along = (grad * factor).sum(dim).mul_(inverse)
    remaining = (along * inverse).mul_(inverse).mul_(norm >= eps)
    return (grad * inverse.unsqueeze(dim)).addcmul_(factor, remaining.unsqueeze(dim), value=-1), along
