"""Small models with adapters of the library's own methods, in float64."""

from collections.abc import Callable
from typing import Any

import peft
import torch
from torch import nn

import delora_kernels as dk

K, N = 8, 12


def goat(experts: int = 4, **options: Any) -> Any:
    top_k = min(2, experts)
    given: dict[str, Any] = {"num_experts": experts, "top_k": top_k, "target_modules": ["0"], "init_weights": False}
    return dk.GoatConfig(r=2, **given | options)


CONFIGS: dict[str, Callable[[], Any]] = {
    "ether": lambda: dk.EtherConfig(n_blocks=2, side="both", target_modules=["0"]),
    "ether_plus": lambda: dk.EtherPlusConfig(n_blocks=2, init_weights=False, target_modules=["0"]),
    "goat_of_one": lambda: goat(1),
    "goat": lambda: goat(),
}
MERGEABLE = ("ether", "ether_plus", "goat_of_one")


def adapted(method: str, seed: int, base: nn.Module | None = None) -> Any:
    """A linear of K inputs and N outputs under one adapter, trained by being drawn."""
    torch.manual_seed(seed)
    return peft.get_peft_model(base or nn.Sequential(nn.Linear(K, N)).double(), CONFIGS[method]()).double()


def layers(model: nn.Module) -> list[Any]:
    """The adapter layers, the outer one of nested ones first."""
    return [module for module in model.modules() if isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer)]


def weight(model: nn.Module) -> torch.Tensor:
    """The one base weight."""
    return layers(model)[0].get_base_layer().weight.data
