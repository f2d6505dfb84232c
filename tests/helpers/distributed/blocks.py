"""The model that the two processes train, and what each sees of its batch."""

from typing import Any

import peft
import torch
from peft_models import Small, config
from torch import Tensor, nn

BLOCKS = 2
LAYERS = 3 * BLOCKS


class Block(Small):
    """Small with a residual around it; its sizes are odd, so that shards differ."""

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.pad(super().forward(x), (0, 3))


class Blocks(nn.Module):
    """Two blocks, [..., 12] → [..., 12]."""

    _no_split_modules = ("Block",)  # what PEFT's policy for FSDP keeps whole

    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(conv1d) for _ in range(BLOCKS))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


def blocks(method: str, seed: int, dtype: torch.dtype = torch.float64) -> Any:
    """A PEFT model of two blocks with three adapter layers each, the same on every rank."""
    torch.manual_seed(seed)
    targets = {"target_modules": ["first", "second", "third"]}
    made = peft.get_peft_model(Blocks(method != "delora"), config(method, **targets)).to(dtype)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """The whole batch, of which each rank takes its half."""
    return torch.randn(4, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def half(x: Tensor, rank: int) -> Tensor:
    """What a rank sees of the batch, or of its output."""
    return x.chunk(2)[rank]
