"""What every launch shares: the device guard, the layout of operands, how two of them meet in a dot."""

import os
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors: Triton decides it when a kernel is defined."""

PLAIN, SPLIT_SMALL, SPLIT_BOTH, WIDE = 0, 1, 2, 3
"""How two operands meet in a dot: as they are; the small one as three bfloat16 parts; both as two; both in float32."""


def guard(tensor: Tensor) -> AbstractContextManager[Any]:
    """The context in which Triton launches on the tensor's device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else nullcontext()


def rows(matrix: Tensor) -> Tensor:
    """The matrix itself if its last dimension is contiguous, else one copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def meeting(big: torch.dtype, small: torch.dtype) -> int:
    """How a token-sized operand and a small one are multiplied, so that nothing is lost that eager PyTorch keeps."""
    if big == small:
        return PLAIN
    return SPLIT_SMALL if (big, small) == (torch.bfloat16, torch.float32) else WIDE


def meeting_in_rank(h: torch.dtype, small: torch.dtype, out: torch.dtype) -> int:
    """How two rank-space operands are multiplied for a result in `out`: float32 ones stay as exact, on fast units."""
    if h == small == torch.float32 != out:
        return SPLIT_BOTH if out == torch.bfloat16 else WIDE
    return meeting(h, small)


def precision(dtype: torch.dtype, how: int) -> str:
    """`input_precision` of a dot: three tf32 products stand in for float32 where the operands were mixed."""
    if how == WIDE:
        return "tf32x3"
    allowed = dtype == torch.float32 and torch.get_float32_matmul_precision() != "highest"
    return "tf32" if allowed else "ieee"
