"""The fold of a pair of factors, and its inverse for gradients: one launch each, a second for a frozen start."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.kernels import add_parts
from delora_kernels.backends.cuda.launch import launch


def fold(
    A: Tensor,
    B: Tensor,
    lam: Tensor | None,
    weight_norm: Tensor | None,
    frozen_A: Tensor | None,
    frozen_B: Tensor | None,
    frozen_lam: Tensor | None,
    eps: float,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Â, B̂ in `dtype` and the norms a, b; the frozen start is folded with the sign turned."""
    pairs = [(A, B, lam, 1.0)]
    if frozen_A is not None and frozen_B is not None:
        pairs.append((frozen_A, frozen_B, lam if frozen_lam is None else frozen_lam, -1.0))
    R, K, N = sum(pair[0].shape[0] for pair in pairs), A.shape[1], B.shape[0]
    A_hat, B_hat = A.new_empty((R, K), dtype=dtype), B.new_empty((N, R), dtype=dtype)
    a, b = (A.new_empty(0 if lam is None else R, dtype=torch.float32) for _ in range(2))
    first = 0
    for one_A, one_B, one_lam, sign in pairs:
        r = one_A.shape[0]
        A_part, B_part, a_part, b_part = A_hat[first : first + r], B_hat[:, first : first + r], a[first:], b[first:]
        launch("fold", one_A, one_B, one_lam, weight_norm, A_part, B_part, a_part, b_part, K, N, r, sign, eps)
        first += r
    return A_hat, B_hat, a, b


def fold_backward(
    dA_hat: Tensor | None,
    dB_hat: Tensor | None,
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    weight_norm: Tensor,
    frozen_B: Tensor | None,
    a: Tensor,
    b: Tensor,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """dÂ → dA and dB̂ → dB in the factors' dtypes, and dλ, whose parts are added in a fixed order."""
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
