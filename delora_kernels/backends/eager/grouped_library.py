"""The linears of an expert model by torch's grouped GEMM, without a look at the offsets.

    grouped(x [T, K], W [E, K, N]) = x_e W_e [T, N]
    grouped(dyᵀ [N, T], x [T, K]) = dy_eᵀ x_e [E, N, K]

It may leave rows behind the last offset and experts without rows unwritten, so they are set to 0
here, and it wants rows that 16 bytes divide: small ranks are padded with columns of 0, of which one
of 1 sums dy for the bias.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from delora_kernels.backends.dropout import KeepMask
from delora_kernels.dtypes import accumulate_dtype

_gemm: Any = getattr(torch.nn.functional, "grouped_mm", None) or getattr(torch, "_grouped_mm", None)
_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def takes(x: Tensor, others: tuple[Tensor | None, ...], widths: Sequence[int]) -> bool:
    """Whether the grouped GEMM is there on x's device, and is to be taken; arguments as `fits`."""
    if x.device.type != "cuda" or _gemm is None or torch.cuda.get_device_capability(x.device) < (8, 0):
        return False
    return fits(x, others, widths)


def fits(x: Tensor, others: tuple[Tensor | None, ...], widths: Sequence[int]) -> bool:
    """Whether dtypes and sizes are the grouped GEMM's.

    Args:
        x: One operand.
        others: The other operands, which must have its dtype; None for one that is not there.
        widths: K and N, of which 16 bytes must divide a row.
    """
    if x.dtype not in _DTYPES or x.shape[0] == 0:
        return False
    if any([each is not None and each.dtype != x.dtype for each in others]):  # noqa: C419, for torch 2.7
        return False
    return all([width * x.itemsize % 16 == 0 for width in widths])  # noqa: C419


def gemm(x: Tensor, right: Tensor, offsets: Tensor) -> Tensor:
    """x_e right_e, [T, C] [E, C, D] → [T, D]; rows behind the last offset may stay unwritten."""
    y: Tensor = _gemm(_aligned(x), _aligned(right), offs=offsets.to(torch.int32))
    return y


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    mask: KeepMask | None = None,
) -> tuple[Tensor, Tensor]:
    """Run the frozen GEMM, two thin ones and an addition."""
    ends, T = offsets.to(torch.int32), x.shape[0]
    rows = torch.arange(T, device=x.device)
    tail = (rows >= ends[-1:])[:, None]
    y = _gemm(_aligned(x), _aligned(weight).mT, offs=ends)
    if bias is not None:
        experts = torch.searchsorted(ends, rows, right=True, out_int32=True).clamp_(max=len(ends) - 1)
        y += bias.to(x.dtype)[experts]
    if A_hat is None or B_hat is None:
        return y.masked_fill_(tail, 0), x.new_empty(0)
    seen = x if mask is None else mask.drop(x, slice(0, T))
    h = _gemm(_aligned(seen), _padded(A_hat * scale, 1).mT, offs=ends)
    h.masked_fill_(tail, 0)
    y += _gemm(h, _padded(B_hat, 2).mT, offs=ends)
    return y.masked_fill_(tail, 0), h[:, : A_hat.shape[1]].contiguous()


def backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    need_bias: bool,
    mask: KeepMask | None = None,
    inverse: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """dv, then what comes of it; dB and the sums of dy from one product."""
    ends, dy, acc = offsets.to(torch.int32), _aligned(dy), accumulate_dtype(dy.dtype)
    tail = (torch.arange(dy.shape[0], device=dy.device) >= ends[-1:])[:, None]
    empty = (ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None]
    dx, dv, (dA, dB) = dy.new_empty(0), None, (dy.new_empty(0, dtype=acc) for _ in range(2))
    dbias = dy.new_empty((0, dy.shape[1]), dtype=acc)
    if B_hat is not None and (x is not None or A_hat is not None):
        dv = _gemm(dy, _padded(B_hat * scale, 2), offs=ends)
    if dv is not None and x is not None and B_hat is not None:
        seen = x if mask is None else mask.drop(x, slice(0, len(x)))
        dA = _gemm(dv.t(), _aligned(seen), offs=ends)[:, : B_hat.shape[2]].to(acc).contiguous()
        dA.masked_fill_(empty, 0).mul_(inverse)
    if weight is not None:
        dx = _gemm(dy, _aligned(weight), offs=ends)
        if dv is not None and A_hat is not None:
            term = _gemm(dv, _padded(A_hat, 1), offs=ends)
            dx += term if mask is None else mask.drop(term, slice(0, len(dy))).mul_(inverse)
        dx.masked_fill_(tail, 0)
    if h is not None or need_bias:
        r = 0 if h is None else h.shape[1]
        left = dy.new_ones((dy.shape[0], 1)) if h is None else torch.cat([h, h.new_ones((h.shape[0], 1))], 1)
        sums = _gemm(_padded(left, 1).t(), dy, offs=ends).to(acc).masked_fill_(empty, 0)
        dB = dB if h is None else sums[:, :r].contiguous().mT
        dbias = sums[:, r].contiguous() if need_bias else dbias
    return dx, dA, dB, dbias


def weight_grad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """One grouped GEMM."""
    ends = offsets.to(torch.int32)
    dW: Tensor = _gemm(_aligned(dy).t(), _aligned(x), offs=ends)
    return dW.masked_fill_((ends.diff(prepend=ends.new_zeros(1)) == 0)[:, None, None], 0)


def _padded(factor: Tensor, dim: int) -> Tensor:
    """Return a factor whose rank, at `dim`, fills 16 bytes, with zeros."""
    width = 16 // factor.itemsize
    more = -factor.shape[dim] % width
    if more == 0:
        return _aligned(factor)
    return pad(factor, (0, more) if dim == factor.dim() - 1 else (0, 0, 0, more)).contiguous()


def _aligned(tensor: Tensor) -> Tensor:
    """Return the tensor with strides and an address that 16 bytes divide."""
    strides, width = tensor.stride(), 16 // tensor.itemsize
    ones = sum(stride == 1 for stride in strides[-2:])
    whole = all(stride % width == 0 for stride in strides if stride != 1) and tensor.storage_offset() % width == 0
    return tensor if ones == 1 and whole and 0 not in strides else tensor.clone(memory_format=torch.contiguous_format)
