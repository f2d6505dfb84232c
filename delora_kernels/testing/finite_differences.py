"""The fused gradients against finite differences in float64: a check that knows nothing of the
reference.
"""

import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from delora_kernels.testing.methods.method import Method
from delora_kernels.testing.problem import Inputs

RTOL = 1e-6
ATOL = 1e-7
_STEP = 1e-6


def gradcheck(
    method: Method, T: int, K: int, N: int, r: int, *, device: str | torch.device = "cpu", seed: int = 0
) -> float:
    """torch.autograd.gradcheck of every gradient of a method, element by element.

    DoRA's norm is a constant for gradients but not for finite differences. So the magnitude follows
    the norm here: c = m / norm then stays where it is while A, B and W are moved, and the gradient
    of m is what it was.

    Args:
        method: What to differentiate.
        T: Tokens.
        K: In-features.
        N: Out-features.
        r: Rank; all sizes small, every element costs two calls.
        device: Where to run.
        seed: Of the inputs.

    Returns:
        The relative error of all gradients together along one random direction d: |⟨dy, y(+d) −
        y(−d)⟩ / 2 − ⟨g, d⟩|.

    Raises:
        torch.autograd.gradcheck.GradcheckError: a gradient is wrong.
    """
    inputs = method.draw(T, K, N, r, dtype=torch.float64, device=device, seed=seed)
    names = method.trained(inputs)

    def forward(*values: Tensor) -> Tensor:
        moved = dict(inputs) | dict(zip(names, values, strict=True))
        if "magnitude" in moved:
            moved["magnitude"] = moved["magnitude"] * (_row_norm(moved) / _row_norm(inputs))
        return method.forward(moved)

    leaves = tuple(inputs[name].clone().requires_grad_() for name in names)
    try:
        torch.autograd.gradcheck(forward, leaves, rtol=RTOL, atol=ATOL)
    except GradcheckError as error:
        raise GradcheckError(f"{str(error).splitlines()[0]} (inputs: {', '.join(names)})\n{error}") from None

    generator = torch.Generator().manual_seed(seed)
    steps = [_STEP * torch.randn(leaf.shape, generator=generator).to(leaf) for leaf in leaves]
    with torch.no_grad():
        ahead, behind = (forward(*(v + s * d for v, d in zip(leaves, steps, strict=True))) for s in (1, -1))
        change = float(((ahead - behind) / 2 * inputs["grad_out"]).sum())
    grads = torch.autograd.grad(forward(*leaves), leaves, inputs["grad_out"])
    predicted = float(sum((g * d).sum() for g, d in zip(grads, steps, strict=True)))
    return abs(change - predicted) / abs(change)


def _row_norm(inputs: Inputs) -> Tensor:
    weight, A, B, scale = (inputs[name] for name in ("weight", "A", "B", "scale"))
    if weight.dim() == 2 and B.dim() == 3:  # a mixture, whose norm has each gate at 1/E
        updated: Tensor = weight + torch.einsum("e,enr,erk->nk", _each(scale, B), B, A) / len(B)
        if inputs.get("frozen_A") is not None:
            residual, frozen_B = inputs.get("residual", 1.0), inputs["frozen_B"]
            updated = updated - torch.einsum("j,jnr,jrk->nk", _each(residual, frozen_B), frozen_B, inputs["frozen_A"])
    else:
        updated = weight + scale * B @ A
    return updated.norm(dim=-1).detach()


def _each(scale: float | Tensor, B: Tensor) -> Tensor:
    return torch.as_tensor(scale).to(B).expand(len(B))
