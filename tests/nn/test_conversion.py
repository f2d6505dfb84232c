"""convert: the adapters that from_linear makes, in their places; all or none; a bar only where it
takes long.
"""

from typing import Any

import pytest
import torch
from torch import nn

from delora_kernels.nn import DeLoRAMoELinear, GoatLinear, LoRALinear, MoELoRALinear, convert

K = 12


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(K)
        self.up, self.down, self.up_gate = nn.Linear(K, 20), nn.Linear(20, K), nn.Linear(K, 20)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm(x)
        return x + self.down(self.up(h) * self.up_gate(h))


@pytest.fixture
def model(seed: int) -> Any:
    torch.manual_seed(seed)
    return nn.Sequential(Block(), Block(), nn.Linear(K, K))


@pytest.mark.parametrize("adapter", [LoRALinear, GoatLinear, DeLoRAMoELinear])
def test_each_target_is_what_from_linear_makes(model: Any, adapter: Any, seed: int) -> None:
    before = dict(model.named_modules())
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    torch.manual_seed(seed)
    placed = convert(model, adapter, ["down", "0.up"], r=1)
    assert list(placed) == ["0.up", "0.down", "1.down"]
    torch.manual_seed(seed)
    for name, module in placed.items():
        alone = adapter.from_linear(before[name], r=1)
        assert model.get_submodule(name) is module
        assert module.weight.data_ptr() == before[name].weight.data_ptr()
        assert repr(module) == repr(alone)
        assert all(torch.equal(a, b) for a, b in zip(module.parameters(), alone.parameters(), strict=True))
    assert {name for name, module in model.named_modules() if isinstance(module, adapter)} == set(placed)
    assert all(model.get_submodule(name) is before[name] for name in ("0.up_gate", "1.up", "2", "0.norm"))
    assert all(torch.equal(weights[name], model.state_dict()[name]) for name in weights)


def test_frozen_before_it_trains_the_adapters_alone(model: Any) -> None:
    model.requires_grad_(False)
    convert(model, MoELoRALinear, ["up", "2"], r=2, experts=4)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{name}.{each}" for name in ("0.up", "1.up", "2") for each in ("A", "B", "router")}
    model(torch.randn(3, K)).sum().backward()
    assert {name for name, parameter in model.named_parameters() if parameter.grad is not None} == trained


def test_a_linear_held_twice_becomes_one_adapter(model: Any) -> None:
    model[1].up_gate = model[0].up
    placed = convert(model, LoRALinear, ["0.up", "up_gate"], r=2)
    assert model[1].up_gate is model[0].up is placed["0.up"] is placed["1.up_gate"]
    assert model[0].up_gate is placed["0.up_gate"] is not placed["0.up"]


@pytest.mark.parametrize(
    ("targets", "options", "kind", "words"),
    [
        ("up", {}, TypeError, "targets must be several names, got the one str 'up'; put it into a list"),
        ([], {}, ValueError, "targets must be names of linears, got none"),
        (["down", "p"], {}, ValueError, "names of modules inside the model, got 'p'"),
        (["down", "norm"], {}, TypeError, "convert at 0.norm: linear must be a plain nn.Linear"),
        (["up", "2"], {"r": 2, "experts": 7}, ValueError, "convert at 2: moe_start: r must be at most"),
        (["up"], {"experts": 0}, ValueError, "experts must be ≥ 1"),
    ],
)
def test_what_does_not_fit_changes_nothing(
    model: Any, targets: Any, options: Any, kind: type[Exception], words: str
) -> None:
    model[0].up, model[1].up = nn.Linear(14, 20), nn.Linear(14, 20)
    before = dict(model.named_modules())
    with pytest.raises(kind, match=words):
        convert(model, GoatLinear, targets, **options)
    assert list(dict(model.named_modules()).values()) == list(before.values())


@pytest.mark.parametrize(("adapter", "got"), [(nn.Linear, "Linear"), (LoRALinear(3, 3, r=1), "LoRALinear"), (5, "int")])
def test_what_is_no_adapter(model: Any, adapter: Any, got: str) -> None:
    with pytest.raises(TypeError, match=f"convert: adapter must be an adapter's class, got {got}; pass one of"):
        convert(model, adapter, ["up"], r=2)


def test_the_bar(model: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    def shown(**options: Any) -> str:
        nn.Module.__setattr__(model, "2", nn.Linear(K, K))
        convert(model, GoatLinear, ["2"], r=1, experts=4, **options)
        return str(capsys.readouterr().err)

    assert shown() == ""  # milliseconds
    monkeypatch.setattr("delora_kernels.nn.conversion.BAR_AFTER_SECONDS", 0)
    bar = shown()
    assert "GoatLinear: 100%" in bar
    assert "1/1" in bar
    assert shown(progress=False) == ""
