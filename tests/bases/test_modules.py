"""The modules of delora_kernels.nn on stored bases: their start, training, state dicts."""

from typing import Any

import pytest
import torch
from stored_layers import stored
from torch import Tensor, nn

from delora_kernels import nn as modules
from delora_kernels.bases.read import base_in

OPTIONS: dict[str, dict[str, Any]] = {
    "LoRALinear": {"r": 4},
    "DoRALinear": {"r": 4},
    "DeLoRALinear": {"r": 4},
    "MoELoRALinear": {"r": 4, "experts": 2},
    "GoatLinear": {"r": 4, "experts": 2},
    "DeLoRAMoELinear": {"r": 4, "experts": 2},
    "EtherLinear": {"n_blocks": 4},
    "EtherPlusLinear": {"n_blocks": 4},
}
"""Module → its options beside those that the linear decides."""


def dense_twin(module: Any, linear: nn.Module) -> Any:
    """The same module on an nn.Linear of the dequantised weight, with the same adapter."""
    base: Any = base_in(linear)
    plain = nn.Linear(base.shape[1], base.shape[0], bias=base.bias is not None)
    plain.weight.data = base.dense(torch.float32)
    if base.bias is not None:
        plain.bias.data = base.bias.detach().clone()
    twin = type(module).from_linear(plain, **OPTIONS[type(module).__name__])
    for start in ("magnitude", "weight_norm", "expert_scale"):  # what the weight alone decides
        if hasattr(twin, start):
            torch.testing.assert_close(getattr(module, start), getattr(twin, start))
    mine = {name: value for name, value in module.state_dict().items() if not name.startswith("stored.")}
    missing, unexpected = twin.load_state_dict(mine, strict=False)
    assert (missing, unexpected) == (["weight"], [])
    return twin


def step(module: nn.Module, x: Tensor) -> dict[str, Tensor]:
    module.zero_grad(set_to_none=True)
    x = x.clone().requires_grad_()
    y = module(x)
    y.square().sum().backward()
    grads = {name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad} | grads


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
def test_on_a_stored_base(form: str, seed: int) -> None:
    """The start and every gradient are those on the dequantised weight; nothing dense is held."""
    x = torch.randn(2, 5, 32)
    for name, options in OPTIONS.items():
        linear = stored(form, 24, 32, seed, dtype=torch.float32)
        module = getattr(modules, name).from_linear(linear, **options)
        assert module.weight is None
        assert module.stored is linear
        twin = dense_twin(module, linear)
        with torch.no_grad():
            for each, same in zip(trained(module), trained(twin), strict=True):
                each += 0.1 * torch.randn_like(each)
                same.copy_(each)
        ours, theirs = step(module, x), step(twin, x)
        assert ours.keys() == theirs.keys()
        for what, value in theirs.items():
            torch.testing.assert_close(ours[what], value, rtol=1e-3, atol=1e-4 * float(value.abs().max()), msg=name)
        sizes = {p.numel() for p in module.parameters() if p.is_floating_point()}
        assert form == "torchao-int8" or 24 * 32 not in sizes


def trained(module: nn.Module) -> list[nn.Parameter]:
    return [p for p in module.parameters() if p.requires_grad]


def test_merging_raises_and_says_what_to_do(seed: int) -> None:
    linear = stored("nf4", 24, 32, seed, dtype=torch.float32)
    module = modules.LoRALinear.from_linear(linear, r=4)
    with pytest.raises(ValueError, match=r"LoRALinear.merge: the weight must be dense, got one stored by a Linear4bit"):
        module.merge()


def test_state_dict(seed: int) -> None:
    """The packed weight and its state are in it, under `stored`; it loads bit for bit."""
    first, second = (
        modules.DoRALinear.from_linear(stored("nf4-nested", 24, 32, seed + i, dtype=torch.float32), r=4) for i in (0, 0)
    )
    with torch.no_grad():
        first.B.normal_()
    state = first.state_dict()
    assert {"A", "B", "magnitude", "bias", "stored.weight", "stored.weight.absmax"} <= state.keys()
    second.load_state_dict({name: value for name, value in state.items() if not name.startswith("stored.weight.")})
    x = torch.randn(3, 32)
    assert torch.equal(first(x), second(x))


def test_what_cant_be_read_is_refused(seed: int) -> None:
    linear: Any = stored("nf4", 24, 32, seed)
    linear.quant_state = linear.weight.quant_state = None
    with pytest.raises(TypeError, match=r"from_linear: linear must be a plain nn.Linear, got one .* read: its"):
        modules.LoRALinear.from_linear(linear, r=4)
