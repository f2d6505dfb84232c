"""The pairs of factors that a fold takes one after the other, and its results, for backends with
kernels of their own.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from delora_kernels.backends.library_gemm import nothing
from delora_kernels.op_arguments import Start, Strength


class Pair(NamedTuple):
    """One pair of factors.

    Args:
        A, B: [r, K], [N, r].
        lam: Its λ, or None.
        sign: Of B̂.
        first: Where its rows begin in Â, and its columns in B̂.
    """

    A: Tensor
    B: Tensor
    lam: Tensor | None
    sign: float
    first: int


def fold_pairs(
    A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype
) -> tuple[list[Pair], tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return the pairs, a frozen start last and with a minus, and Â, B̂ in `dtype`, a and b,
    not yet written.
    """
    pairs = [Pair(A, B, strength.lam, 1.0, 0)]
    if start.frozen_A is not None and start.frozen_B is not None:
        lam = strength.lam if start.frozen_lam is None else start.frozen_lam
        pairs.append(Pair(start.frozen_A, start.frozen_B, lam, -1.0, A.shape[0]))
    R = sum(pair.A.shape[0] for pair in pairs)
    if strength.lam is None:
        a, b = nothing(A.device, torch.float32), nothing(A.device, torch.float32, 1)
    else:
        a, b = A.new_empty(R, dtype=torch.float32), A.new_empty(R, dtype=torch.float32)
    A_hat, B_hat = A.new_empty((R, A.shape[1]), dtype=dtype), B.new_empty((B.shape[0], R), dtype=dtype)
    return pairs, (A_hat, B_hat, a, b)
