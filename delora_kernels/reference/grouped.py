"""The linears of an expert model, each with an adapter of its own, on tokens sorted by expert.

    y_t = x_t W'_eᵀ + bias_e  for every row t of expert e

W'_e is what lora.py, dora.py and delora.py make of W_e: each expert by itself. In the rows behind
the last offset, which belong to no expert, y is 0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from delora_kernels.reference.delora import delora_factors, delora_linear
from delora_kernels.reference.dora import dora_linear


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its linear with its low-rank update, expert by expert.

        y_e = x_e W_eᵀ + s · (x ⊙ mask)_e A_eᵀ B_eᵀ + bias_e

    Args:
        x: `[T, K]`, the rows of expert 0 first, then those of expert 1, ...
        weight: `[E, N, K]`.
        A: `[E, r, K]`.
        B: `[E, N, r]`.
        offsets: `[E]`, ints: where the rows of each expert end.
        scale: s.
        bias: `[E, N]` or None.
        dropout_mask: `[T, K]` with entries 0 or 1 / (1 − p), on the input of the low-rank branch;
            None: no dropout.

    Returns:
        y, `[T, N]`.

    Source: Hu et al. (arXiv:2106.09685), equation 3, for each expert.
    """

    def linear(e: int, rows: slice) -> Tensor:
        x_e = x[rows]
        seen = x_e if dropout_mask is None else x_e * dropout_mask[rows]
        y_e = x_e @ weight[e].T + scale * (seen.to(A.dtype) @ A[e].T) @ B[e].T
        return y_e if bias is None else y_e + bias[e]

    return _expert_by_expert(linear, offsets, x.shape[0])


def grouped_lora_linear_dense(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Compute the same by every expert's whole matrix on every row, of which each keeps its own.

        y[t, n] = Σ_e m[t, e] (Σ_k x[t, k] W'[e, n, k] + bias[e, n]),
        m[t, e] = 1 where offsets[e − 1] ≤ t < offsets[e], else 0

    With a mask W' is that of x ⊙ mask, and W that of x − x ⊙ mask.

    Args:
        x, weight, A, B, offsets, scale, bias, dropout_mask: as in `grouped_lora_linear`.

    Returns:
        y, `[T, N]`.
    """
    member, updated = _members(x, offsets), grouped_lora_weight(weight, A, B, scale)
    seen = x.to(A.dtype) if dropout_mask is None else x.to(A.dtype) * dropout_mask
    each = torch.einsum("tk,enk->ten", seen, updated)
    if dropout_mask is not None:
        each = each + torch.einsum("tk,enk->ten", x.to(A.dtype) - seen, weight.to(A.dtype))
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


def grouped_dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Apply `dora_linear` to the rows of every expert, expert by expert; dropout is the branch's.

    Args:
        x, weight, A, B, offsets, scale, bias, dropout_mask: as in `grouped_lora_linear`.
        magnitude: `[E, N]`.

    Returns:
        y, `[T, N]`.

    Source: arXiv:2402.09353, equation 5, for each expert.
    """

    def linear(e: int, rows: slice) -> Tensor:
        mask = None if dropout_mask is None else dropout_mask[rows]
        rest = (scale, None if bias is None else bias[e])
        return dora_linear(
            x[rows], weight[e], A[e], B[e], magnitude[e], *rest, dropout_mask=mask, dropout="branch"
        )  # fmt: skip

    return _expert_by_expert(linear, offsets, x.shape[0])


def grouped_dora_linear_dense(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Compute the same from `grouped_lora_linear_dense`, whose columns each row's expert scales.

        y[t, n] = Σ_e m[t, e] (c[e, n] u[t, n] + bias[e, n])

    Args:
        x, weight, A, B, magnitude, offsets, scale, bias, dropout_mask: as in `grouped_dora_linear`.

    Returns:
        y, `[T, N]`.
    """
    u = grouped_lora_linear_dense(x, weight, A, B, offsets, scale, dropout_mask=dropout_mask)
    squared = grouped_lora_weight(weight, A, B, scale).detach().square().sum(2)
    c = magnitude * torch.where(squared == 0, 0.0, squared.rsqrt())
    member = _members(x, offsets).to(c.dtype)
    y = (member @ c) * u
    return y if bias is None else y + member @ bias.to(c.dtype)


def grouped_dora_weight(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float = 1.0) -> Tensor:
    """Return the matrices that `grouped_dora_linear` applies when nothing is dropped.

        W'[e, n, :] = magnitude[e, n] · V[e, n, :] / ‖V[e, n, :]‖,    V = W + s · B A

    Args:
        weight, A, B, magnitude, scale: as in `grouped_dora_linear`.

    Returns:
        W', `[E, N, K]`; 0 where V[e, n, :] = 0.
    """
    V = grouped_lora_weight(weight, A, B, scale)
    squared = V.detach().square().sum(2, keepdim=True)
    return magnitude[:, :, None] * torch.where(squared == 0, 0.0, squared.rsqrt()) * V


def grouped_delora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    lam: Tensor,
    weight_norm: Tensor,
    offsets: Tensor,
    bias: Tensor | None = None,
    *,
    eps: float = 1e-4,
    dropout_mask: Tensor | None = None,
) -> Tensor:
    """Apply `delora_linear` to the rows of every expert, expert by expert.

    Args:
        x, weight, A, B, offsets, bias, dropout_mask: as in `grouped_lora_linear`.
        lam: `[E]`.
        weight_norm: `[E, K]` or `[E]`.
        eps: as in `delora_linear`.

    Returns:
        y, `[T, N]`.

    Source: arXiv:2503.18225, equations 5 and 8, for each expert.
    """

    def linear(e: int, rows: slice) -> Tensor:
        mask = None if dropout_mask is None else dropout_mask[rows]
        own = (A[e], B[e], lam[e], weight_norm[e], None if bias is None else bias[e])
        return delora_linear(x[rows], weight[e], *own, eps=eps, dropout_mask=mask)

    return _expert_by_expert(linear, offsets, x.shape[0])


def grouped_delora_weight(
    weight: Tensor, A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor, *, eps: float = 1e-4
) -> Tensor:
    """Return the matrices that `grouped_delora_linear` applies when nothing is dropped.

    Args:
        weight, A, B, lam, weight_norm, eps: as in `grouped_delora_linear`.

    Returns:
        W', `[E, N, K]`: W + B̂ Â of `delora_factors` for each expert.
    """
    pairs = [delora_factors(*each, eps=eps) for each in zip(A, B, lam, weight_norm, strict=True)]
    return weight + torch.stack([B_hat @ A_hat for A_hat, B_hat in pairs])


def _expert_by_expert(linear: Callable[[int, slice], Tensor], offsets: Tensor, T: int) -> Tensor:
    """Join what each expert makes of its rows, and zeros for those that are nobody's."""
    parts, begin = [], 0
    for e, end in enumerate(offsets.tolist()):
        parts.append(linear(e, slice(begin, end)))
        begin = end
    return torch.cat([*parts, parts[0].new_zeros(T - begin, parts[0].shape[1])])


def _members(x: Tensor, offsets: Tensor) -> Tensor:
    """Return m `[T, E]`: 1 where a row is an expert's, else 0."""
    t = torch.arange(x.shape[0], device=x.device)[:, None]
    ends = offsets.to(t)
    return ((t < ends) & (t >= torch.cat([ends.new_zeros(1), ends[:-1]]))).to(x.dtype)
