"""What the functions make of checked arguments alike: their dtypes, tokens laid out as rows, a low-rank call."""

import torch
from torch import Tensor

from delora_kernels.call import Call, Options


def dtypes(x: Tensor, *factors: Tensor) -> tuple[torch.dtype, torch.dtype]:
    """compute_dtype and rank_dtype of a call: autocast's, or x's and the widest of x's and the factors'."""
    device = x.device.type
    if torch.is_autocast_enabled(device) and x.dtype != torch.float64:  # autocast leaves float64 alone
        dtype = torch.get_autocast_dtype(device)
        return dtype, dtype
    rank_dtype = x.dtype
    for factor in factors:
        if factor.dtype != rank_dtype:
            rank_dtype = torch.promote_types(rank_dtype, factor.dtype)
    return x.dtype, rank_dtype


def as_rows(x: Tensor) -> Tensor:
    """x `[..., K]` as `[T, K]`."""
    return x if x.dim() == 2 else x.flatten(0, -2) if x.dim() > 2 else x.unsqueeze(0)


def low_rank_call(
    name: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    *,
    dropout_p: tuple[float, ...],
    seed: Tensor | None,
    ranks: tuple[int, ...] = (),
    scale: float = 1.0,
    magnitude: Tensor | None = None,
    lam: Tensor | None = None,
    weight_norm: Tensor | None = None,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    frozen_lam: Tensor | None = None,
    eps: float = 0.0,
    two_term: bool = False,
    save_output: bool = False,
) -> Call:
    """Make the call of a low-rank method: arguments checked, as in `Call` and `Options`."""
    frozen_rank = 0 if frozen_A is None else frozen_A.shape[0]
    options = Options(name, scale, eps, ranks, dropout_p, two_term, save_output, frozen_rank, *dtypes(x, A, B))
    start = (frozen_A, frozen_B, frozen_lam)
    return Call(as_rows(x), weight, bias, A, B, magnitude, lam, weight_norm, *start, seed, options)
