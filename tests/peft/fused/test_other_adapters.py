"""Adapters of other libraries under accelerate(): named in the report, and left as they are."""

from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from peft_models import Small, config, step
from torch import Tensor, nn
from torch.nn.utils import parametrize

import delora_kernels as dk


class LoRAModule(nn.Module):
    """As kohya-ss's trainers and LyCORIS have it: its forward takes the place of the layer's."""

    def __init__(self, layer: nn.Linear, r: int = 2) -> None:
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, r, bias=False)
        self.lora_up = nn.Linear(r, layer.out_features, bias=False)
        self.org_module = [layer]  # in a list: no module of this one

    def apply_to(self) -> None:
        self.org_forward = self.org_module[0].forward
        self.org_module[0].forward = self.forward

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.org_forward(x) + self.lora_up(self.lora_down(x))
        return y


class Network(nn.Module):
    def __init__(self, *layers: nn.Linear) -> None:
        super().__init__()
        self.loras = nn.ModuleList(LoRAModule(layer) for layer in layers)
        for lora in self.loras:
            lora.apply_to()


class Injected(nn.Module):
    """As cloneofsimo's lora has it: around the layer."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.linear, self.lora_down, self.lora_up = layer, nn.Linear(20, 2), nn.Linear(2, 14)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x) + self.lora_up(self.lora_down(x))
        return y


class Shared(nn.Linear):
    """A layer of the user's own class."""

    def __init__(self) -> None:
        super().__init__(20, 14)


class Parametrization(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(2, 20)), nn.Parameter(torch.randn(14, 2))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.lora_B @ self.lora_A


class LoRALinearLayer(nn.Module):
    """As diffusers' former attention processors had it."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.up = nn.Linear(20, 2), nn.Linear(2, 14)


class Processor(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.to_q_lora = LoRALinearLayer()


class OFTModule(nn.Module):
    """As LyCORIS has its algorithms without a pair of factors."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.oft_blocks, self.org_forward = nn.Parameter(torch.randn(14, 14)), layer.forward
        layer.forward = self.forward  # type: ignore[method-assign]

    def forward(self, x: Tensor) -> Tensor:
        return self.org_forward(x) @ self.oft_blocks


def patched(model: Any) -> None:
    Network(model.second)


def network_first(model: Any) -> None:
    """The network is part of the model, and comes before the layer."""
    layers = dict(model.named_children())
    for name in layers:
        delattr(model, name)
    model.network = Network(layers["second"])
    for name, layer in layers.items():
        setattr(model, name, layer)


CASES: dict[str, tuple[Callable[[Any], Any], str, str]] = {
    "kohya-ss": (patched, "second", "LoRAModule"),
    "without a pair": (lambda model: OFTModule(model.second), "second", "OFTModule"),
    "kohya-ss, its network in the model": (network_first, "second", "LoRAModule"),
    "injected": (lambda model: setattr(model, "second", Injected(model.second)), "second", "Injected"),
    "parametrized": (
        lambda model: parametrize.register_parametrization(model.second, "weight", Parametrization()),
        "second.parametrizations.weight.0",
        "Parametrization",
    ),
    "processor": (
        lambda model: setattr(model, "processor", Processor()),
        "processor.to_q_lora",
        "LoRALinearLayer",
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_named(case: str, seed: int) -> None:
    """Alone, and beside PEFT's, which are fused; strict raises; nothing of it is changed."""
    change, name, kind = CASES[case]
    torch.manual_seed(seed)
    model, x = Small(conv1d=False), torch.randn(3, 12)
    change(model)
    theirs = step(model, x)
    with pytest.raises(RuntimeError, match="fused 0 of 1 adapter layers"):
        dk.accelerate(model, strict=True)
    report = dk.accelerate(model)
    (layer,) = report.layers
    assert (layer.name, layer.fused, layer.code) == (name, False, "another-library")
    assert layer.method.endswith(f".{kind}")
    assert f"another library's adapter, {layer.method}" in str(report)
    assert all(torch.equal(ours, theirs[key]) for key, ours in step(model, x).items())
    assert dk.restore(model) == 0

    peft.inject_adapter_in_model(config("lora", target_modules=["first", "third"]), model)
    report = dk.accelerate(model)
    assert [each.name for each in report.fused] == ["first", "third"]
    assert [each.name for each in report.declined] == [name]
    assert report.to_dict()["totals"]["layers"] == 3


def test_what_is_none(seed: int) -> None:
    """A forward of the module's own, of one without parameters, of another layer of torch's or of
    the same class; a model without adapters.
    """
    model: Any = Small(conv1d=False)
    model.first.forward = model.first.forward
    model.third.forward = nn.Identity().forward
    model.second.forward = nn.Linear(20, 14).forward
    model.convolution, model.own, model.shared = nn.Conv1d(20, 14, 1), Shared(), Shared()
    model.convolution.forward = model.second.forward
    model.shared.forward = model.own.forward
    with pytest.raises(ValueError, match="accelerate: model must hold PEFT adapter layers, got a Small without any"):
        dk.accelerate(model)
    model.third = peft.inject_adapter_in_model(config("lora", target_modules=["third"]), Small(conv1d=False)).third
    model.third.base_layer.forward = LoRAModule(nn.Linear(14, 9)).forward
    assert [layer.name for layer in dk.accelerate(model).layers] == ["third"]
