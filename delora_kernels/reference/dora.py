"""DoRA: low-rank updates turn the rows of W, a learned magnitude sets their lengths.

    W' = diag(m / ‖V‖) V,    V = W + s · B A,    ‖V‖ [N]: the Euclidean norm of each row of V

Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), equation 5 (their
"columns" are rows here: they write W transposed). ‖V‖ counts as a constant in backward: section
4.3, equation 11.

A row of V that is exactly zero has no direction: its scale c = m / ‖V‖ is defined as 0. So that row
of W' is 0, its output is the bias, and no gradient passes through it, not even to its magnitude.
(With the two-term dropout below, the part x − x_d of the input is still multiplied by that row of
W, which is usually zero as well.)
"""

import torch
from torch import Tensor


def dora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    magnitude: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_mask: Tensor | None = None,
    dropout: str = "peft",
) -> Tensor:
    """Apply a frozen linear whose updated rows are rescaled to learned magnitudes.

        y = c ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + bias,    c = m / ‖W + s · B A‖, the norm detached

    Dropout, with x_d = x ⊙ mask:

        "peft"     y = x Wᵀ + (c − 1) ⊙ (x_d Wᵀ) + c ⊙ (s · x_d Aᵀ Bᵀ) + bias
        "branch"   y = c ⊙ (x Wᵀ + s · x_d Aᵀ Bᵀ) + bias

    "peft" is what the authors' code and PEFT compute: the frozen weight itself sees x, all that the
    adapter adds to it (rescaling included) sees x_d. "branch" drops only the input of the low-rank
    factors and needs one frozen GEMM.

    Args:
        x: `[..., K]`, any float dtype, which all tensors share.
        weight: W, `[N, K]`, nn.Linear's layout.
        A: `[r, K]`.
        B: `[N, r]`.
        magnitude: m, `[N]`.
        scale: s, usually alpha / r.
        bias: `[N]` or None; not scaled by c.
        dropout_mask: `[T, K]` with entries 0 or 1 / (1 − p); None: no dropout, both forms agree.
        dropout: "peft" or "branch".

    Returns:
        y, `[..., N]`.

    Raises:
        ValueError: `dropout` is neither of the two.

    Source: arXiv:2402.09353, equation 5, detached as in equation 11; the two-term dropout is
    PEFT's.
    """
    c = _row_scale(weight, A, B, magnitude, scale)
    dropped = x if dropout_mask is None else x * dropout_mask.reshape(x.shape)
    low_rank = scale * (dropped.to(A.dtype) @ A.T) @ B.T
    if dropout == "peft":
        y = x @ weight.T + (c - 1) * (dropped.to(x.dtype) @ weight.T) + c * low_rank
    elif dropout == "branch":
        y = c * (x @ weight.T + low_rank)
    else:
        raise ValueError(f"dora_linear: dropout must be 'peft' or 'branch', got {dropout!r}; pick one of them")
    return y if bias is None else y + bias


def dora_weight(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float = 1.0) -> Tensor:
    """Return the matrix `dora_linear` applies when nothing is dropped.

        W'[n, :] = m[n] · V[n, :] / ‖V[n, :]‖,    V = W + s · B A;    0 where V[n, :] = 0

    Its row norms are |m|. The norm is detached, as in `dora_linear`.

    Args:
        weight, A, B, magnitude, scale: as in `dora_linear`.

    Returns:
        W', `[N, K]`.

    Source: arXiv:2402.09353, equation 5.
    """
    V = weight + scale * torch.einsum("ni,ik->nk", B, A)
    squared = V.detach().square().sum(dim=1)
    return torch.einsum("n,nk->nk", magnitude * torch.where(squared == 0, 0.0, squared.rsqrt()), V)


def _row_scale(weight: Tensor, A: Tensor, B: Tensor, magnitude: Tensor, scale: float) -> Tensor:
    """c = m / ‖W + s · B A‖ by rows, `[N]`; a zero norm counts as ∞, so that c and its gradient are
    0 there.
    """
    norm = (weight + scale * B @ A).norm(dim=1).detach()
    return magnitude / torch.where(norm == 0, torch.inf, norm)
