"""An accelerated layer whose calls are judged twice: at one look, and by plan.py alone."""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import straight

METHODS = ("lora", "dora", "delora")


T, K, N, R = 6, 12, 20, 3


def layer_of(method: str, seed: int, dtype: torch.dtype = torch.float64, dropout_p: float = 0.0) -> Any:
    """An accelerated layer with two adapters, the first one active."""
    torch.manual_seed(seed)
    model: Any = nn.ModuleDict({"linear": nn.Linear(K, N)}).to(dtype)
    options: dict[str, Any] = {"r": R, "target_modules": ["linear"]}
    if method == "delora":
        config: Any = peft.DeloraConfig(init_weights=False, module_dropout=dropout_p, **options)
    else:
        lora = {"lora_alpha": 5, "init_lora_weights": False, "lora_dropout": dropout_p}
        config = peft.LoraConfig(use_dora=method == "dora", **lora, **options)
    made = peft.get_peft_model(model, config)
    made.add_adapter("other", config)
    dk.accelerate(made, strict=True)
    layer = made.base_model.model.linear
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.dim() == 1 and parameter.shape[0] == N:
                parameter.mul_(0.5 + torch.rand_like(parameter))
    return layer.to(dtype)


def outcome(layer: Any, x: Tensor, context: Any = None) -> dict[str, Any]:
    """Everything that a call and its backward pass give, or what they raise."""
    x = x.detach().clone().requires_grad_(x.is_floating_point() and x.layout == torch.strided)
    layer.zero_grad(set_to_none=True)
    torch.manual_seed(5)
    try:
        with context or nullcontext():
            y = layer(x)
            if y.requires_grad:
                (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    grads = {name: p.grad for name, p in layer.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}


def same(ours: dict[str, Any], theirs: dict[str, Any], bits: bool = True) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        if isinstance(value, Tensor):
            assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
            exact = bits and name == "y"
            finite = value[value.isfinite()].abs()
            limit = 64 * torch.finfo(value.dtype).eps * float(finite.max()) if finite.numel() and not exact else 0.0
            torch.testing.assert_close(ours[name], value, rtol=0, atol=limit, equal_nan=True, msg=name)
        else:
            assert ours[name] == value, name


def judged_twice(
    layer: Any, x: Tensor, monkeypatch: pytest.MonkeyPatch, context: Callable[[], Any] = nullcontext
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcome with the straight way open, and by plan.py alone."""
    ours = outcome(layer, x, context())
    with monkeypatch.context() as patch:
        patch.setattr(straight, "enabled", False)
        theirs = outcome(layer, x, context())
    return ours, theirs
