"""LoRA whose lora_B has a bias (PEFT's lora_bias=True): y = x Wᵀ + bias + scale · (x Aᵀ Bᵀ + b)."""

from typing import Any

import pytest
import torch
from peft_models import assert_close, model, step
from torch import nn

import delora_kernels as dk

BIAS = {"lora_bias": True}


def _beside(made: Any) -> None:
    """A base that can't be read: it runs its own forward."""
    for layer in made.base_model.model.children():
        layer.base_layer.register_forward_hook(lambda *_: None)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("readable", [True, False])
def test_pefts_numbers(readable: bool, dtype: torch.dtype, autocast: bool, seed: int) -> None:
    """Output and every gradient, the biases' among them; float32 factors on a bfloat16 base too."""
    made = model("lora", seed, dtype=dtype, **BIAS)
    if not readable:
        _beside(made)
    x = torch.randn(2, 5, 12, dtype=dtype)
    for parameter in made.parameters():
        parameter.requires_grad_()  # the base's own biases train
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = step(made, x)
        report = dk.accelerate(made)
        ours = step(made, x)
    assert {layer.state for layer in report.layers} == {"fused" if readable else "rank term fused"}
    assert sum(name.endswith("lora_B.default.bias") for name in ours) == 3
    assert_close(ours, theirs, torch.bfloat16 if autocast else dtype)


def test_the_scale_counts(seed: int) -> None:
    """It is scale · b, of each adapter its own, on a base without a bias too."""
    torch.manual_seed(seed)
    made = model("lora", seed, dtype=torch.float64, **BIAS)
    dk.accelerate(made, strict=True)
    layer: Any = made.base_model.model.third
    layer.set_scale("default", 7.0)
    x, B = torch.randn(4, 14, dtype=torch.float64), layer.lora_B["default"]
    expected = x @ layer.base_layer.weight.T + layer.scaling["default"] * (
        x @ layer.lora_A["default"].weight.T @ B.weight.T + B.bias
    )
    torch.testing.assert_close(layer(x), expected, rtol=0, atol=1e-12 * float(expected.detach().abs().max()))
    B.bias = nn.Parameter(B.bias.detach() + 1)
    torch.testing.assert_close(layer(x), expected + layer.scaling["default"], rtol=0, atol=1e-11)
