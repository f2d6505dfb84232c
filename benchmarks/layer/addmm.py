"""The rival that Unsloth and axolotl ship, written here: library GEMMs, and the low-rank terms
added with beta = 1.

    y = x Wᵀ;  y += s · (x Aᵀ) Bᵀ          dx = dy W;  dx += s · (dy B) A

Kept: x, and h is computed again. DeLoRA is folded into A and B by autograd; DoRA scales y by m / ‖W
+ s·BA‖, whose dense norm is detached and computed at every call, and keeps the unscaled y, as
axolotl's kernel does.
"""

from typing import Any

import torch
from torch import Tensor


class _AddmmLinear(torch.autograd.Function):
    """y = x Wᵀ + s · x Aᵀ Bᵀ on 2-D tensors of one dtype."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, weight, A, B)
        ctx.scale = scale
        return (x @ weight.T).addmm_(x @ A.T, B.T, alpha=scale)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, A, B = ctx.saved_tensors
        dv = dy @ B
        dx = (dy @ weight).addmm_(dv, A, alpha=ctx.scale)
        return dx, None, ctx.scale * (dv.T @ x), ctx.scale * (dy.T @ (x @ A.T)), None


def addmm(made: dict[str, Any]) -> Tensor:
    """y [T, N] of the method whose arguments `made` holds.

    Args:
        made: As benchmarks.layer.methods.inputs; its leaves require grad. Factors are cast to x's
            dtype.
    """
    x, weight, A, B = made["x"], made["weight"], made["A"], made["B"]
    scale = made.get("scale", 1.0)
    if "lam" in made:
        clamp = 1e-4
        A = A / A.norm(dim=1, keepdim=True).clamp_min(clamp) * made["weight_norm"]
        B = B * (made["lam"] / len(A) / B.norm(dim=0).clamp_min(clamp))
    A, B = A.to(x.dtype), B.to(x.dtype)
    y: Tensor = _AddmmLinear.apply(x, weight, A, B, scale)
    if "magnitude" in made:
        with torch.no_grad():
            norm = (weight + scale * B @ A).norm(dim=1)
        y = y * (made["magnitude"] / norm).to(x.dtype)
    return y
