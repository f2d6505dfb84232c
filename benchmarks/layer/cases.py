"""One PEFT layer and the same layer fused, on the same tensors, and the frozen linear they sit on."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn

import delora_kernels as dk

METHODS = ("lora", "dora", "delora")
PRECISIONS = {
    "bf16-autocast": "bf16 base, fp32 adapters, autocast",
    "bf16-fp32": "bf16 base, fp32 adapters, no autocast",
    "fp32": "all fp32",
}
"""Name → what it says in tables."""


@dataclass
class Case:
    """A layer at one shape and precision.

    Args:
        method: One of METHODS.
        precision: One of PRECISIONS.
        T, K, N, r: Tokens, in-features, out-features, rank.
    """

    method: str
    precision: str
    T: int
    K: int
    N: int
    r: int

    def __post_init__(self) -> None:
        torch.manual_seed(0)
        dtype = torch.float32 if self.precision == "fp32" else torch.bfloat16
        self.autocast = self.precision == "bf16-autocast"
        model = nn.Sequential(nn.Linear(self.K, self.N, bias=False)).to(dtype)
        self.layer: Any = peft.get_peft_model(model, self._config()).base_model.model[0]
        self.x = torch.randn(self.T, self.K).to(dtype).requires_grad_()
        self.dy = torch.randn(self.T, self.N).to(dtype)

    def _config(self) -> Any:
        if self.method == "delora":
            return peft.DeloraConfig(r=self.r, target_modules=["0"], init_weights=False)
        use_dora = self.method == "dora"
        return peft.LoraConfig(
            r=self.r, lora_alpha=2 * self.r, target_modules=["0"], use_dora=use_dora, init_lora_weights=False
        )

    def forwards(self) -> dict[str, Callable[[], Tensor]]:
        """impl → forward pass: the frozen linear, PEFT's layer, and the same layer fused."""
        shared = {id(tensor): tensor for tensor in (*self.layer.parameters(), *self.layer.buffers())}
        fused = copy.deepcopy(self.layer, memo=shared)
        dk.accelerate(fused, strict=True)
        layers = {"frozen": self.layer.base_layer, "peft": self.layer, "dk": fused}
        return {impl: self._in_autocast(layer) for impl, layer in layers.items()}

    def _in_autocast(self, layer: Callable[[Tensor], Tensor]) -> Callable[[], Tensor]:
        def run() -> Tensor:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.autocast):
                return layer(self.x)

        return run

    def passes(self) -> dict[str, Callable[[], None]]:
        """impl → forward and backward pass, dx included; the gradients are let go at the end."""

        def both_ways(forward: Callable[[], Tensor]) -> Callable[[], None]:
            def run() -> None:
                forward().backward(self.dy)
                for tensor in (self.x, *self.layer.parameters()):
                    tensor.grad = None

            return run

        return {impl: both_ways(forward) for impl, forward in self.forwards().items()}
