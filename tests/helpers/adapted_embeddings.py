"""A table with PEFT's adapters, DoRA's magnitudes off the norms."""

from typing import Any

import peft
import torch
from peft_models import config
from torch import Tensor, nn


class Scaled(nn.Embedding):
    """Scales what it looks up, as Gemma's does; PEFT knows it by this attribute."""

    def __init__(self, *sizes: int) -> None:
        super().__init__(*sizes)
        self.register_buffer("embed_scale", torch.tensor(3.0), persistent=False)
        self.scalar_embed_scale = 3.0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * self.embed_scale.to(self.weight.dtype)


class Net(nn.Module):
    def __init__(self, kind: type[nn.Embedding] = nn.Embedding) -> None:
        super().__init__()
        self.table = kind(23, 12)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.table(x)
        return y


def adapted(method: str, seed: int, dtype: torch.dtype = torch.float32, kind: Any = nn.Embedding) -> Any:
    torch.manual_seed(seed)
    made = peft.get_peft_model(Net(kind).to(dtype), config(method, target_modules=["table"]))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
            if "lora_embedding" in name:
                parameter.normal_()
    return made


def step(made: Any, tokens: Tensor) -> dict[str, Tensor]:
    made.zero_grad(set_to_none=True)
    y = made(tokens)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return {"y": y.detach()} | {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


def tokens(seed: int, *shape: int) -> Tensor:
    return torch.randint(23, shape or (2, 7), generator=torch.Generator().manual_seed(seed))
