"""A mixture's factors side by side, [A; G; A⁰] and [B | −γ B⁰], in one launch."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.launch import launch
from delora_kernels.op_arguments import ExpertFactors


def stack_factors(factors: ExpertFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stack [A; G; A⁰] and [B | −γ B⁰] in `dtype`."""
    *parts, B, frozen_B, residual = factors
    E, N, r = B.shape
    sizes = [0 if part is None else len(part) for part in parts]
    K = next((part.shape[1] for part in parts if part is not None), 0)
    starts, _, r0 = (0, N, 1) if frozen_B is None else frozen_B.shape
    rows = B.new_empty((sum(sizes), K) if K else 0, dtype=dtype)
    columns = B.new_empty((N, E * r + starts * r0), dtype=dtype)
    launch(
        "stack_factors", *parts, B.contiguous().flatten(0, 1),
        None if frozen_B is None else frozen_B.contiguous().flatten(0, 1),
        None if residual is None else residual.contiguous(), rows if K else None, columns,
        K, N, *sizes, E, r, starts, r0,
    )  # fmt: skip
    return rows, columns
