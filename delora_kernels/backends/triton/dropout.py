"""Dropout masks as tensors, and inputs with them applied, for what runs on a library GEMM (PEFT's
two-term DoRA).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import threshold
from delora_kernels.backends.triton.device import keep_tile
from delora_kernels.backends.triton.launch import launch, record, rows
from delora_kernels.backends.triton.tables import cdiv

_BT, _BC = 32, 128


@triton.jit(do_not_specialize=["T"])
def mask_kernel(SEED, MASK, T, K, threshold, BT: tl.constexpr, BC: tl.constexpr):
    """One tile [BT, BC] of a bool mask [T, K]."""
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    keep = keep_tile(SEED, t, c0, K, threshold, BT, BC)
    tl.store(MASK + t[:, None] * K + c[None, :], keep, (t[:, None] < T) & (c[None, :] < K))


@triton.jit(do_not_specialize=["T"])
def drop_kernel(X, SEED, DROPPED, REST, T, K, stride_x, threshold, inverse, BT: tl.constexpr, BC: tl.constexpr):
    """One tile [BT, BC] of drop(x) and of x − drop(x), each rounded once from float32."""
    t = tl.program_id(1).to(tl.int64) * BT + tl.arange(0, BT)
    c0 = tl.program_id(0) * BC
    c = c0 + tl.arange(0, BC)
    inside = (t[:, None] < T) & (c[None, :] < K)
    x = tl.load(X + t[:, None] * stride_x + c[None, :], inside, 0.0).to(tl.float32)
    dropped = x * keep_tile(SEED, t, c0, K, threshold, BT, BC).to(tl.float32) * inverse
    at = t[:, None] * K + c[None, :]
    tl.store(DROPPED + at, dropped.to(DROPPED.dtype.element_ty), inside)
    tl.store(REST + at, (x - dropped).to(REST.dtype.element_ty), inside)


def dropout_mask(T: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the elements of a [T, K] input that are kept, bool: the bits of the eager backend."""
    mask = seed.new_empty((T, K), dtype=torch.bool)
    if T * K:
        made = record(mask_kernel, (K, threshold(dropout_p)), BT=_BT, BC=_BC)
        launch(made, _grid(T, K), (seed, mask), (T,))
    return mask


def drop(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """drop(x) and x − drop(x), [T, K] each, from one read of x."""
    x, (T, K) = rows(x), x.shape
    dropped, rest = x.new_empty((T, K)), x.new_empty((T, K))
    if T * K:
        made = record(drop_kernel, (K, x.stride(0), threshold(dropout_p)), BT=_BT, BC=_BC)
        launch(made, _grid(T, K), (x, seed, dropped, rest), (T,), (1 / (1 - dropout_p),))
    return dropped, rest


def _grid(T: int, K: int) -> tuple[int, int]:
    return cdiv(K, _BC), cdiv(T, _BT)
