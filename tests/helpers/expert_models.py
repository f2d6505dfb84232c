"""Experts modules of several model families, small and random, adapted by PEFT through
`target_parameters`.
"""

from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

E, H, INNER, TOP_K = 5, 16, 8, 2
"""Experts, hidden and intermediate size, experts of a token."""

_SIZES = {"hidden_size": H, "intermediate_size": INNER, "num_local_experts": E, "hidden_act": "silu"}
_QWEN = {"hidden_size": H, "moe_intermediate_size": INNER, "num_experts": E, "hidden_act": "silu"}
_DEEPSEEK = {"hidden_size": H, "moe_intermediate_size": INNER, "n_routed_experts": E, "num_local_experts": E}

_ARIA = {"hidden_size": H, "intermediate_size": INNER, "moe_num_experts": E, "num_attention_heads": 2}
_ARIA |= {"num_key_value_heads": 2}
_MUSE = _QWEN | {"moe_hidden_size": H, "num_local_experts": E, "num_attention_heads": 2, "num_key_value_heads": 2}

FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3MoeExperts", "Qwen3MoeConfig", _QWEN),
    "mixtral": ("MixtralExperts", "MixtralConfig", _SIZES),
    "gpt_oss": ("GptOssExperts", "GptOssConfig", _SIZES),  # transposed, biases, interleaved
    "deepseek_v3": ("DeepseekV3Experts", "DeepseekV3Config", _DEEPSEEK),
    "granitemoe": ("GraniteMoeExperts", "GraniteMoeConfig", _SIZES),
    "nemotron_h": (
        "NemotronHExperts",
        "NemotronHConfig",
        {"hidden_size": H, "moe_intermediate_size": INNER},
    ),  # ungated
    "aria": ("AriaExperts", "AriaTextConfig", _ARIA),
    "muse_spark": ("MuseSparkExperts", "MuseSparkTextConfig", _MUSE),  # a norm
}
IMPLEMENTATIONS = ("eager", "grouped_mm", "batched_mm")


class Block(nn.Module):
    """An experts module under the name that models give it."""

    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, chosen, weights)
        return y


def block(family: str = "qwen3_moe", implementation: str = "grouped_mm", seed: int = 0, **sizes: int) -> Block:
    """An experts module with random weights, by its family's own class and configuration."""
    transformers = pytest.importorskip("transformers", "5")
    kind, config_name, options = FAMILIES[family]
    config_kind = getattr(transformers, config_name, None)
    if config_kind is None:
        pytest.skip(f"this Transformers has no {config_name}")
    config = config_kind(**options | sizes)
    config._experts_implementation_internal = implementation
    module = __import__(config_kind.__module__.rpartition(".")[0], fromlist=["x"])
    modeling = __import__(f"{module.__name__}.modeling_{family}", fromlist=["x"])
    experts = getattr(modeling, kind)(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    return Block(experts)


def up_name(made: Block) -> str:
    """The first projection's parameter."""
    experts: Any = made.experts
    return "gate_up_proj" if getattr(experts, "has_gate", True) else "up_proj"


def adapted(made: Block, targets: tuple[str, ...] = (), r: int = 3, seed: int = 1, **options: Any) -> Any:
    """The block with adapters on its projections, every factor random."""
    names = targets or (up_name(made), "down_proj")
    parameters = [f"experts.{name}" for name in names]
    config = peft.LoraConfig(r=r, lora_alpha=5, target_modules=[], target_parameters=parameters, **options)
    model = peft.get_peft_model(made, config)
    randomise(model, seed)
    return model


def randomise(model: nn.Module, seed: int) -> None:
    """Draw every factor."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(0.3 * torch.randn(parameter.shape, generator=generator))


def routed(T: int, seed: int, experts: int = E, k: int = TOP_K, dtype: torch.dtype = torch.float32) -> Any:
    """x, chosen experts and weights of T tokens; expert 1 gets none."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, H, generator=generator).to(dtype)
    scores = torch.rand(T, experts, generator=generator)
    scores[:, 1] = -1
    chosen = scores.topk(k, dim=1).indices
    return x, chosen, torch.rand(T, k, generator=generator).to(dtype)


def step(model: nn.Module, inputs: Any, trained: bool = True) -> dict[str, Tensor]:
    """y, and the gradients of x, of the weights and of every parameter that has one."""
    x, chosen, weights = inputs
    x, weights = x.detach().clone().requires_grad_(trained), weights.detach().clone().requires_grad_(trained)
    model.zero_grad(set_to_none=True)
    y = model(x, chosen, weights)
    found = {"y": y.detach()}
    if trained:
        generator = torch.Generator().manual_seed(7)
        y.backward(torch.randn(y.shape, generator=generator).to(y.dtype))
        found |= {"x": x.grad, "weights": weights.grad}
        found |= {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value for name, value in found.items() if value is not None}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 2e-5) -> None:
    """The same names, dtypes and, to `limit` of the largest, values."""
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype, name
        assert ours[name].shape == value.shape, name
        if value.numel():
            assert float((ours[name] - value).abs().max()) <= limit * float(value.abs().max()), name
