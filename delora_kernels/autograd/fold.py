"""DeLoRA's fold alone, differentiable: its normalised update as a plain low-rank pair.

Inside `delora_linear` the fold is part of the one autograd Function. Here it stands alone for
whoever wants the pair itself: several DeLoRA adapters stacked into one, or a DeLoRA adapter written
as a LoRA adapter.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd.function import refuse_second_derivatives
from delora_kernels.op_arguments import Folded, Start, Strength


class Fold(torch.autograd.Function):
    """Â, B̂ = fold(A, B, λ, n), in the wider dtype of A and B."""

    @staticmethod
    def forward(
        ctx: Any, A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor, eps: float, backend: str
    ) -> tuple[Tensor, Tensor]:
        dtype = torch.promote_types(A.dtype, B.dtype)
        A_hat, B_hat, a, b = ops.fold(A, B, Strength(lam, weight_norm, eps), Start(), dtype, backend)
        ctx.save_for_backward(A, B, lam, weight_norm, a, b)
        ctx.eps, ctx.backend = eps, backend
        return A_hat, B_hat

    @staticmethod
    def backward(ctx: Any, dA_hat: Tensor, dB_hat: Tensor) -> tuple[Tensor | None, ...]:
        A, B, lam, weight_norm, a, b = ctx.saved_tensors
        with torch.no_grad():
            dA, dB, dlam = ops.fold_backward(
                dA_hat.to(a.dtype),
                dB_hat.to(b.dtype),
                Folded(A, B, a, b),
                Strength(lam, weight_norm, ctx.eps),
                ctx.backend,
            )
        grads = (dA, dB, dlam.reshape(lam.shape).to(lam.dtype), None, None, None)
        if not torch.is_grad_enabled():
            return grads
        return refuse_second_derivatives("delora_linear", grads, (dA_hat, dB_hat, A, B, lam))
