"""The fold of a pair of factors, and its inverse for gradients: one launch, a program for each row
of A, column of B.

DeLoRA's factors are normalised and cast, LoRA's and DoRA's only cast.

A program reads its vector twice, first for the norm (or the product with its gradient), then to
write it scaled. All arithmetic is in float32. Nothing here is token-sized.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.eager.fold import frozen_dlam
from delora_kernels.backends.fold_pairs import fold_pairs
from delora_kernels.backends.triton.launch import launch, record
from delora_kernels.op_arguments import Folded, Start, Strength

BLOCK, WARPS = 4096, 8
"""Elements of one step of a program: few steps, because few programs run and each waits for memory.
"""


@triton.jit
def _inverse(norm, eps, CLAMP: tl.constexpr):
    """1 / max(norm, eps); without a clamp 0 for a norm of 0."""
    if CLAMP:
        return 1.0 / tl.maximum(norm, eps)
    return tl.where(norm == 0.0, 0.0, 1.0 / tl.where(norm == 0.0, 1.0, norm))


@triton.jit
def fold_kernel(
    A, B, LAM, WEIGHT_NORM, A_HAT, B_HAT, NORM_A, NORM_B, K, N, r, R, offset,
    stride_ar, stride_ak, stride_bn, stride_br, sign, eps,
    NORMALISE: tl.constexpr, CLAMP: tl.constexpr, WITH_VECTOR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i < r: row i of Â and its norm; program r + j: column j of B̂ and its norm, both from
    `offset` on.
    """
    i = tl.program_id(0)
    is_row = i < r
    j = tl.where(is_row, i, i - r).to(tl.int64)
    length = tl.where(is_row, K, N)
    source = tl.where(is_row, 0, 1)
    if NORMALISE:
        squares = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, length, BLOCK):
            e = start + tl.arange(0, BLOCK).to(tl.int64)
            a = tl.load(A + j * stride_ar + e * stride_ak, (source == 0) & (e < length), 0.0).to(tl.float32)
            b = tl.load(B + e * stride_bn + j * stride_br, (source == 1) & (e < length), 0.0).to(tl.float32)
            squares += (a + b) * (a + b)
        norm = tl.sqrt(tl.sum(squares))
        inverse = _inverse(norm, eps, CLAMP)
        tl.store(NORM_A + offset + j, norm, is_row)
        tl.store(NORM_B + offset + j, norm, source == 1)
        strength = inverse * (tl.load(LAM).to(tl.float32) * sign / r)
    for start in range(0, length, BLOCK):
        e = start + tl.arange(0, BLOCK).to(tl.int64)
        row, column = (source == 0) & (e < length), (source == 1) & (e < length)
        a = tl.load(A + j * stride_ar + e * stride_ak, row, 0.0).to(tl.float32)
        b = tl.load(B + e * stride_bn + j * stride_br, column, 0.0).to(tl.float32)
        if NORMALISE:
            n = tl.load(WEIGHT_NORM + e, row, 0.0) if WITH_VECTOR else tl.load(WEIGHT_NORM)
            a = a * inverse * n.to(tl.float32)
            b = b * strength
        tl.store(A_HAT + (offset + j) * K + e, a.to(A_HAT.dtype.element_ty), row)
        tl.store(B_HAT + e * R + offset + j, b.to(B_HAT.dtype.element_ty), column)


def fold(
    A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Â, B̂ in `dtype` and the norms a, b; a frozen start is a second launch, with a
    minus.
    """
    pairs, (A_hat, B_hat, a, b) = fold_pairs(A, B, strength, start, dtype)
    _, weight_norm, eps = strength
    weight_norm = None if weight_norm is None else weight_norm.contiguous()
    for pair_A, pair_B, lam, sign, offset in pairs:
        (r, K), N, R = pair_A.shape, pair_B.shape[0], A_hat.shape[0]
        made = record(
            fold_kernel, (K, N, r, R, offset, *pair_A.stride(), *pair_B.stride()),
            NORMALISE=lam is not None, CLAMP=eps > 0,
            WITH_VECTOR=weight_norm is not None and weight_norm.dim() > 0, BLOCK=BLOCK, num_warps=WARPS,
        )  # fmt: skip
        launch(made, (2 * r,), (pair_A, pair_B, lam, weight_norm, A_hat, B_hat, a, b), (), (sign, eps))
    return A_hat, B_hat, a, b


@triton.jit
def fold_backward_kernel(
    GRAD_A, GRAD_B, A, B, LAM, WEIGHT_NORM, NORM_A, NORM_B, DA, DB, ALONG, K, N, r, stride_gr, stride_gk, stride_gn,
    stride_gc, stride_ar, stride_ak, stride_bn, stride_br, eps,
    CLAMP: tl.constexpr, WITH_VECTOR: tl.constexpr, WITH_A: tl.constexpr, WITH_B: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Program i < r: row i of dA; program r + j: column j of dB and its part of dλ. Both drop what
    lies along.
    """
    i = tl.program_id(0)
    if WITH_A:  # known when compiled, unlike the next
        if i < r:
            j = i.to(tl.int64)
            norm = tl.load(NORM_A + j)
            inverse = _inverse(norm, eps, CLAMP)
            products = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, K, BLOCK):
                e = start + tl.arange(0, BLOCK).to(tl.int64)
                n = tl.load(WEIGHT_NORM + e, e < K, 0.0) if WITH_VECTOR else tl.load(WEIGHT_NORM)
                g = tl.load(GRAD_A + j * stride_gr + e * stride_gk, e < K, 0.0).to(tl.float32) * n.to(tl.float32)
                products += g * tl.load(A + j * stride_ar + e * stride_ak, e < K, 0.0).to(tl.float32)
            along = tl.sum(products) * inverse
            rest = tl.where(norm >= eps, along * inverse * inverse, 0.0)
            for start in range(0, K, BLOCK):
                e = start + tl.arange(0, BLOCK).to(tl.int64)
                n = tl.load(WEIGHT_NORM + e, e < K, 0.0) if WITH_VECTOR else tl.load(WEIGHT_NORM)
                g = tl.load(GRAD_A + j * stride_gr + e * stride_gk, e < K, 0.0).to(tl.float32) * n.to(tl.float32)
                a = tl.load(A + j * stride_ar + e * stride_ak, e < K, 0.0).to(tl.float32)
                tl.store(DA + j * K + e, (g * inverse - a * rest).to(DA.dtype.element_ty), e < K)
    if WITH_B:
        if i >= r:
            j = (i - r).to(tl.int64)
            norm = tl.load(NORM_B + j)
            inverse = _inverse(norm, eps, CLAMP)
            products = tl.zeros((BLOCK,), tl.float32)
            for start in range(0, N, BLOCK):
                e = start + tl.arange(0, BLOCK).to(tl.int64)
                g = tl.load(GRAD_B + e * stride_gn + j * stride_gc, e < N, 0.0).to(tl.float32)
                products += g * tl.load(B + e * stride_bn + j * stride_br, e < N, 0.0).to(tl.float32)
            along = tl.sum(products) * inverse
            tl.store(ALONG + j, along / r)
            rest = tl.where(norm >= eps, along * inverse * inverse, 0.0)
            strength = tl.load(LAM).to(tl.float32) / r
            for start in range(0, N, BLOCK):
                e = start + tl.arange(0, BLOCK).to(tl.int64)
                g = tl.load(GRAD_B + e * stride_gn + j * stride_gc, e < N, 0.0).to(tl.float32)
                b = tl.load(B + e * stride_bn + j * stride_br, e < N, 0.0).to(tl.float32)
                tl.store(DB + e * r + j, ((g * inverse - b * rest) * strength).to(DB.dtype.element_ty), e < N)


def fold_backward(
    dA_hat: Tensor | None, dB_hat: Tensor | None, folded: Folded, strength: Strength
) -> tuple[Tensor, Tensor, Tensor]:
    """dÂ → dA and dB̂ → dB in the factors' dtypes, and dλ, whose parts are added in a fixed
    order.
    """
    (A, B, a, b, frozen_B), (lam, weight_norm, eps) = folded, strength
    assert weight_norm is not None
    weight_norm = weight_norm.contiguous()
    (r, K), N = A.shape, B.shape[0]
    dA = A.new_empty(0 if dA_hat is None else (r, K))
    dB = B.new_empty(0 if dB_hat is None else (N, r))
    along = b.new_empty(r)
    strides = (
        *(dA_hat.stride() if dA_hat is not None else (0, 0)),
        *(dB_hat.stride() if dB_hat is not None else (0, 0)),
    )
    made = record(
        fold_backward_kernel, (K, N, r, *strides, *A.stride(), *B.stride()),
        CLAMP=eps > 0, WITH_VECTOR=weight_norm.dim() > 0, WITH_A=dA_hat is not None, WITH_B=dB_hat is not None,
        BLOCK=BLOCK, num_warps=WARPS,
    )  # fmt: skip
    launch(made, (2 * r,), (dA_hat, dB_hat, A, B, lam, weight_norm, a, b, dA, dB, along), (), (eps,))
    if dB_hat is None:
        return dA, dB, b.new_empty(0)
    dlam = along.sum(0, keepdim=True)
    if frozen_B is not None:
        dlam -= frozen_dlam(dB_hat, frozen_B, b, eps)
    return dA, dB, dlam
