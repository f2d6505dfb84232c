"""The linears of an expert model, each with a low-rank update of its own, on tokens sorted by
expert.

    W'_e = W_e + s · B_e A_e        y_t = x_t W'_eᵀ + bias_e  for every row t of expert e

Hu et al. (arXiv:2106.09685), equation 3, for each expert by itself.
"""

import torch
from torch import Tensor


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its linear with its low-rank update, expert by expert.

        y_e = x_e W_eᵀ + s · x_e A_eᵀ B_eᵀ + bias_e

    Args:
        x: `[T, K]`, the rows of expert 0 first, then those of expert 1, ...
        weight: `[E, N, K]`.
        A: `[E, r, K]`.
        B: `[E, N, r]`.
        offsets: `[E]`, ints: where the rows of each expert end.
        scale: s.
        bias: `[E, N]` or None.

    Returns:
        y, `[T, N]`; 0 in the rows behind the last offset, which belong to no expert.

    Source: arXiv:2106.09685, equation 3.
    """
    parts, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        x_e = x[begin:end]
        y_e = x_e @ weight[e].T + scale * (x_e.to(A.dtype) @ A[e].T) @ B[e].T
        parts.append(y_e if bias is None else y_e + bias[e])
        begin = end
    parts.append(parts[0].new_zeros(x.shape[0] - begin, weight.shape[1]))
    return torch.cat(parts)


def grouped_lora_linear_dense(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Compute the same by every expert's whole matrix on every row, of which each keeps its own.

        y[t, n] = Σ_e m[t, e] (Σ_k x[t, k] W'[e, n, k] + bias[e, n]),
        m[t, e] = 1 where offsets[e − 1] ≤ t < offsets[e], else 0

    Args:
        x, weight, A, B, offsets, scale, bias: as in `grouped_lora_linear`.

    Returns:
        y, `[T, N]`.
    """
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    ends = offsets.to(t)
    member = ((t < ends) & (t >= torch.cat([ends.new_zeros(1), ends[:-1]]))).to(x.dtype)
    each = torch.einsum("tk,enk->ten", x.to(A.dtype), grouped_lora_weight(weight, A, B, scale))
    return torch.einsum("te,ten->tn", member.to(each.dtype), each if bias is None else each + bias)


def grouped_lora_weight(weight: Tensor, A: Tensor, B: Tensor, scale: float = 1.0) -> Tensor:
    """Return the matrices that `grouped_lora_linear` applies.

        W'[e, n, k] = W[e, n, k] + s · Σᵢ B[e, n, i] A[e, i, k]

    Args:
        weight, A, B, scale: as in `grouped_lora_linear`.

    Returns:
        W', `[E, N, K]`.
    """
    return weight + scale * torch.einsum("eni,eik->enk", B, A)
