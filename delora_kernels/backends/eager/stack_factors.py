"""A mixture's factors side by side, as the frozen GEMMs' rank-R term wants them: one copy for each
tensor.
"""

import torch
from torch import Tensor

from delora_kernels.op_arguments import ExpertFactors


def stack_factors(factors: ExpertFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stack [A; G; A⁰] and [B | −γ B⁰] in `dtype`, cast on the way."""
    *firsts, B, frozen_B, residual = factors
    parts = [part for part in firsts if part is not None]
    rows = B.new_empty((sum(map(len, parts)), parts[0].shape[1]) if parts else 0, dtype=dtype)
    for here, part in zip(rows.split([len(part) for part in parts]), parts, strict=True):
        here.copy_(part)
    experts, N, r = B.shape
    subtracted = None if frozen_B is None or residual is None else frozen_B * (-residual)[:, None, None]
    more = 0 if subtracted is None else subtracted.shape[0] * subtracted.shape[2]
    columns = B.new_empty((N, experts * r + more), dtype=dtype)
    columns[:, : experts * r].unflatten(1, (experts, r)).copy_(B.transpose(0, 1))
    if subtracted is not None:
        columns[:, experts * r :].unflatten(1, (len(subtracted), -1)).copy_(subtracted.transpose(0, 1))
    return rows, columns
