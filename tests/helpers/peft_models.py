"""Small PEFT models with adapters away from their start, and what one training step of them
gives.
"""

from typing import Any

import peft
import torch
from torch import Tensor, nn

METHODS = ("lora", "rslora", "dora", "delora")


def config(method: str, r: int = 3, dropout_p: float = 0.0, **options: Any) -> Any:
    """A PEFT config of `method` whose adapters start at random values."""
    if method == "delora":
        return peft.DeloraConfig(r=r, delora_lambda=3, init_weights=False, module_dropout=dropout_p, **options)
    lora = {"use_rslora": method == "rslora", "use_dora": method == "dora", "lora_dropout": dropout_p}
    return peft.LoraConfig(r=r, lora_alpha=5, init_lora_weights=False, **lora | options)


class Small(nn.Module):
    """Two linears of different shapes, one without bias, and a Transformers Conv1D where the method
    takes it.
    """

    def __init__(self, conv1d: bool) -> None:
        super().__init__()
        from transformers.pytorch_utils import Conv1D

        self.first = nn.Linear(12, 20)
        self.second = Conv1D(14, 20) if conv1d else nn.Linear(20, 14)
        self.third = nn.Linear(14, 9, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.third(nn.functional.gelu(self.second(nn.functional.gelu(self.first(x)))))
        return y


def model(method: str, seed: int, dropout_p: float = 0.0, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    """A PeftModel around Small; DoRA's magnitudes are moved away from the norms."""
    torch.manual_seed(seed)
    targets = {"target_modules": ["first", "second", "third"]}
    made = peft.get_peft_model(
        Small(method != "delora").to(dtype), config(method, dropout_p=dropout_p, **targets | options)
    )
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made


def step(made: nn.Module, x: Tensor, seed: int | None = None) -> dict[str, Tensor]:
    """The output and every gradient of one pass over x, by name."""
    made.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    if seed is not None:
        torch.manual_seed(seed)
    y = made(x)
    y.float().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> None:
    """Each of `step`'s results has its dtype, and its numbers but for the rounding of three
    layers.
    """
    assert ours.keys() == theirs.keys()
    numbers = [value.double().abs() for value in theirs.values() if value.numel() == 1]
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        # a lone number (dλ) may be a sum that cancels: the model's other ones tell what is large
        scale = max(numbers) if value.numel() == 1 else value.double().abs().max()
        # both sides round differently in a chain of three layers, each with a few roundings of size
        # eps
        error = (ours[name].double() - value.double()).abs().max() / scale
        assert error <= 64 * torch.finfo(dtype).eps, (name, error)
