"""A small net of convolutions with PEFT's adapters, DoRA's magnitudes off the norms."""

from typing import Any

import peft
import torch
from peft_models import config
from torch import Tensor, nn

KINDS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class Net(nn.Module):
    """Two convolutions: strided with a bias, 1 × 1 without one."""

    def __init__(self, dims: int) -> None:
        super().__init__()
        self.first = KINDS[dims](3, 8, 3, stride=2, padding=1)
        self.second = KINDS[dims](8, 5, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.second(nn.functional.gelu(self.first(x)))
        return y


def adapted(method: str, seed: int, dims: int = 2, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    torch.manual_seed(seed)
    targets = {"target_modules": ["first", "second"]}
    made = peft.get_peft_model(Net(dims).to(dtype), config(method, **targets | options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made


def images(seed: int, dims: int = 2, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(2, 3, *(7,) * dims, generator=torch.Generator().manual_seed(seed)).to(dtype)
