"""Random float64 calls of the reference, one variant per convention of a method, and their
gradients.
"""

import os
import secrets
from typing import Any

import torch
from torch import Tensor

from delora_kernels import reference

VARIANTS = ("lora", "dora_peft", "dora_branch", "delora_peft", "delora_authors", "delora_paper")
CONSTANTS = ("weight_norm", "frozen_A", "frozen_B", "frozen_lam", "dropout_mask")


class Maker:
    """Draws arguments. Entries of factors and weights have sizes in [0.5, 1.5]: no norm is near
    zero by chance.

    Args:
        seed: None draws one and prints it, so that a failing test shows it; TEST_SEED in the
            environment repeats it.
    """

    def __init__(self, seed: int | None = None) -> None:
        if seed is None:
            seed = int(os.environ.get("TEST_SEED", secrets.randbits(31)))
            print(f"TEST_SEED={seed}")
        self.generator = torch.Generator().manual_seed(seed)

    def tensor(self, *shape: int) -> Tensor:
        """Random signs, sizes in [0.5, 1.5]."""
        size = torch.rand(shape, dtype=torch.float64, generator=self.generator) + 0.5
        return size * torch.randint(0, 2, shape, generator=self.generator).mul(2).sub(1)

    def arguments(self, variant: str, T: int = 5, K: int = 7, N: int = 6, r: int = 3) -> dict[str, Any]:
        """Every argument of the variant's function, by name."""
        made: dict[str, Any] = {"x": self.tensor(T, K), "weight": self.tensor(N, K), "bias": self.tensor(N)}
        made |= {"A": self.tensor(r, K), "B": self.tensor(N, r)}
        made["dropout_mask"] = (torch.rand(T, K, dtype=torch.float64, generator=self.generator) >= 0.25) / 0.75
        if not variant.startswith("delora"):
            made |= {"scale": 0.7}
        if variant.startswith("dora"):
            made |= {"magnitude": self.tensor(N), "dropout": variant.removeprefix("dora_")}
        if variant.startswith("delora"):
            made |= {"lam": self.tensor().abs(), "weight_norm": self.tensor(K).abs(), "eps": 0.0}
        if variant == "delora_peft":
            made |= {"lam": self.tensor(1), "eps": 1e-4}
        if variant in ("delora_authors", "delora_paper"):
            made |= {"frozen_A": self.tensor(r + 1, K), "frozen_B": self.tensor(N, r + 1)}
        if variant == "delora_paper":
            made |= {"weight_norm": self.tensor().abs(), "frozen_lam": 1.3}
        return made


def function_of(variant: str) -> str:
    """Name of the function a variant calls."""
    return f"{variant.split('_')[0]}_linear"


def weight_of(function: str, arguments: dict[str, Any]) -> Tensor:
    """The reference's W' for the arguments of `function`."""
    rest = {k: v for k, v in arguments.items() if k not in ("x", "bias", "dropout_mask", "dropout")}
    adapted: Tensor = getattr(reference, function.replace("linear", "weight"))(**rest)
    return adapted


def run(function: str, arguments: dict[str, Any], grad_out: Tensor | None = None) -> tuple[Tensor, dict[str, Tensor]]:
    """The reference's y, and the gradient of Σ y · grad_out (default: Σ y) to every tensor that is
    not a constant.
    """
    leaves = {k: v.detach().clone() if isinstance(v, Tensor) else v for k, v in arguments.items()}
    trained = [k for k, v in leaves.items() if isinstance(v, Tensor) and k not in CONSTANTS]
    for name in trained:
        leaves[name].requires_grad_()
    y = getattr(reference, function)(**leaves)
    grads = torch.autograd.grad(y, [leaves[k] for k in trained], torch.ones_like(y) if grad_out is None else grad_out)
    return y.detach(), dict(zip(trained, grads, strict=True))
