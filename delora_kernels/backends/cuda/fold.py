"""The fold of a pair of factors, and its inverse for gradients: one launch each, a second for a
frozen start.
"""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.kernels import add_parts
from delora_kernels.backends.cuda.launch import launch
from delora_kernels.backends.fold_pairs import fold_pairs
from delora_kernels.op_arguments import Folded, Start, Strength


def fold(
    A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Â, B̂ in `dtype` and the norms a, b; the frozen start is folded with a minus."""
    pairs, (A_hat, B_hat, a, b) = fold_pairs(A, B, strength, start, dtype)
    for pair_A, pair_B, lam, sign, first in pairs:
        (r, K), N = pair_A.shape, pair_B.shape[0]
        into = (A_hat[first : first + r], B_hat[:, first : first + r], a[first:], b[first:])
        launch("fold", pair_A, pair_B, lam, strength.weight_norm, *into, K, N, r, sign, strength.eps)
    return A_hat, B_hat, a, b


def fold_backward(
    dA_hat: Tensor | None, dB_hat: Tensor | None, folded: Folded, strength: Strength
) -> tuple[Tensor, Tensor, Tensor]:
    """dÂ → dA and dB̂ → dB in the factors' dtypes, and dλ, whose parts are added in a fixed
    order.
    """
    (A, B, a, b, frozen_B), (lam, weight_norm, eps) = folded, strength
    (r, K), N = A.shape, B.shape[0]
    r0 = 0 if frozen_B is None or dB_hat is None else frozen_B.shape[1]
    dA = A.new_empty(0 if dA_hat is None else (r, K))
    dB = B.new_empty(0 if dB_hat is None else (N, r))
    along = b.new_empty((r + r0, 1) if dB_hat is not None else (0, 1))
    launch(
        "fold_backward", dA_hat, dB_hat, A, B, lam, weight_norm, frozen_B if r0 else None, a, b,
        None if dA_hat is None else dA, None if dB_hat is None else dB, along, K, N, r, r0, eps,
    )  # fmt: skip
    return dA, dB, b.new_empty(0) if dB_hat is None else add_parts(along, b.dtype)
