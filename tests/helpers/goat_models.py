"""Small PEFT models with GOAT adapters, and what the reference makes of one of their layers."""

import copy
from typing import Any

import peft
import torch
from peft_models import Small
from torch import Tensor, nn

from delora_kernels import reference
from delora_kernels.integrations.peft.methods.goat import GoatConfig, PeftGoatLinear

TARGETS = ["first", "second", "third"]
KINDS: dict[str, dict[str, Any]] = {
    "goat": {},
    "one of all": {"top_k": 1, "init_weights": "milora", "scaling": "goat-s", "init_cof": 0.3, "balance": "paper"},
    "plain": {"init_weights": "zero", "scaling": "alpha/r", "renormalize": False, "top_k": 3},
    "dense": {"init_weights": "zero", "scaling": [1.0, 2.0, 3.0], "top_k": None, "num_experts": 3},
    "shared": {"shared_A": True, "top_k": None, "scaling": 2.0},
    "normalised": {"normalize": True, "goat_lambda": 3.0},
    "random": {"init_weights": False, "scaling": "rslora"},
    "dora": {"use_dora": True, "init_cof": 0.4},
    "dora of normalised": {"use_dora": True, "normalize": True, "goat_lambda": 3.0},
}


def config(**options: Any) -> GoatConfig:
    """A config of four experts of rank 2 on every layer of `Small`."""
    return GoatConfig(**{"r": 2, "num_experts": 4, "target_modules": list(TARGETS)} | options)


def small(seed: int, dtype: torch.dtype = torch.float64) -> nn.Module:
    """A base model: two nn.Linear, one without bias, and a Conv1D."""
    torch.manual_seed(seed)
    return Small(True).to(dtype)


def model(base: nn.Module, moved: bool = True, **options: Any) -> Any:
    """A PeftModel on a copy of `base`, its parameters away from their start if `moved`."""
    made = peft.get_peft_model(copy.deepcopy(base), config(**options))
    if moved:
        move(made)
    return made


def move(made: nn.Module) -> None:
    """Add noise to all that is trained."""
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn_like(parameter)


def layers(made: nn.Module) -> dict[str, PeftGoatLinear]:
    """The GOAT layers by name."""
    return {name: layer for name, layer in made.named_modules() if isinstance(layer, PeftGoatLinear)}


def expected(layer: Any, x: Tensor, leaves: dict[str, Tensor], adapter: str = "default") -> Any:
    """The reference's output and statistics of one layer, with `leaves` in place of its
    parameters.
    """
    c, base = layer.options[adapter], layer.get_base_layer()
    weight = base.weight.detach()
    weight = weight.t() if type(base).__name__ == "Conv1D" else weight
    arguments: dict[str, Any] = {"A": leaves["goat_A"], "B": leaves["goat_B"], "router": leaves["goat_router"]}
    if c.normalize:
        A, B = arguments["A"], arguments["B"]
        arguments["A"] = A / A.norm(dim=2, keepdim=True).clamp(min=1e-4) * weight.norm(dim=0)
        arguments["B"] = B / B.norm(dim=1, keepdim=True).clamp(min=1e-4)
        arguments["scale"] = leaves["goat_lambda"] / layer.r[adapter]
    else:
        arguments["scale"] = layer.goat_scale[adapter].double()
    if adapter in layer.goat_start_A:
        gamma = 1 / c.num_experts if c.init_cof is None else c.init_cof
        arguments |= {"frozen_A": layer.goat_start_A[adapter], "frozen_B": layer.goat_start_B[adapter]}
        arguments["residual"] = gamma * arguments["scale"]
    if c.use_dora:
        arguments["magnitude"] = leaves["goat_magnitude"]
    return reference.moe_lora_linear(x, weight, top_k=c.top_k, renormalize=c.renormalize, bias=base.bias, **arguments)
