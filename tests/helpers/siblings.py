"""A small PEFT model whose linears share inputs: q, k, v one, gate and up another, o and down
none.
"""

from collections.abc import Callable
from typing import Any

import peft
import torch
from peft_models import config
from peft_pairs import gradients
from torch import Tensor, nn

import delora_kernels as dk

K = 12
TOKENS = (2, 5)
ALL = ("q", "k", "v", "o", "gate", "up", "down")


class Attention(nn.Module):
    """Three linears of one x, of different widths, one with a bias, and one of what they give."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 16), nn.Linear(K, 8, bias=False), nn.Linear(K, 8)
        self.o = nn.Linear(16, K)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.q(x), self.k(x), self.v(x)
        y: Tensor = self.o(q * torch.cat([torch.sin(k), v], dim=-1))
        return y


class Block(nn.Module):
    """Attention and a gated MLP, each with its residual."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.norm = Attention(), nn.LayerNorm(K)
        self.gate, self.up, self.down = nn.Linear(K, 20), nn.Linear(K, 20), nn.Linear(20, K)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm(x))
        normed = self.norm(x)
        y: Tensor = x + self.down(nn.functional.silu(self.gate(normed)) * self.up(normed))
        return y


def model(
    method: str,
    seed: int,
    blocks: int = 1,
    inner: Any = None,
    dtype: torch.dtype = torch.float64,
    dropout_p: float = 0.0,
) -> Any:
    """A PEFT model in training mode, its adapters off their start, DoRA's magnitudes off the
    norms.
    """
    torch.manual_seed(seed)
    base = nn.Sequential(*(Block() for _ in range(blocks))) if inner is None else inner()
    made = peft.get_peft_model(base, config(method, dropout_p=dropout_p, target_modules=list(ALL))).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made.train()


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input."""
    return torch.randn(*TOKENS, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def warm_up(made: nn.Module, seed: int = 0) -> None:
    """Two steps, after which the groups are known and run."""
    for _ in range(2):
        made(batch(seed)).sum().backward()
    made.zero_grad(set_to_none=True)


class Siblings(nn.Module):
    """q, k and v of one x, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, 16), nn.Linear(K, 20), nn.Linear(K, 24)
        self.order: str = "qkv"

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([getattr(self, name)(x) for name in self.order], dim=-1)


def step(made: nn.Module, x: Tensor, forward: Callable[[Any, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """The output and every gradient of one pass over x."""
    made.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = made(x) if forward is None else forward(made, x)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | gradients(made)  # type: ignore[dict-item]


def pair(method: str, seed: int, **options: Any) -> tuple[Any, Any, Any]:
    """A model whose groups run, the same one of PEFT, and the report."""
    made, plain = model(method, seed, **options), model(method, seed, **options)
    report = dk.accelerate(made, strict=True)
    warm_up(made)
    return made, plain, report
