"""What the library's own methods refuse to adapt: errors name the layer, what came and how to leave
it out.
"""

from typing import Any

import peft
import pytest
import torch
from torch import nn

import delora_kernels as dk


class Classifier(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body, self.score = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.score(self.body(x))


@pytest.mark.parametrize(
    "config",
    [
        lambda **o: dk.GoatConfig(r=1, num_experts=4, **o),
        lambda **o: dk.EtherConfig(n_blocks=2, side="output", **o),
        lambda **o: dk.EtherPlusConfig(n_blocks=2, **o),
    ],
)
def test_an_option_that_does_not_fit_names_the_layer(config: Any) -> None:
    with pytest.raises(ValueError, match=r"target module 'score': .*exclude_modules=\['score'\]"):
        peft.get_peft_model(Classifier(), config(target_modules=["body", "score"]))
    peft.get_peft_model(Classifier(), config(target_modules=["body", "score"], exclude_modules=["score"]))


def test_a_further_adapter_that_does_not_fit_names_the_layer() -> None:
    model = peft.get_peft_model(Classifier(), dk.EtherConfig(target_modules=["body", "score"]))
    with pytest.raises(ValueError, match="target module 'base_model.model.score'|target module 'score'"):
        model.add_adapter("second", dk.EtherConfig(n_blocks=2, side="output", target_modules=["body", "score"]))


class Quantised(torch.Tensor):
    """Integers that call themselves float32, as torchao's tensors do, and do nothing."""

    @staticmethod
    def __new__(cls, numbers: torch.Tensor) -> "Quantised":
        return torch.Tensor._make_wrapper_subclass(cls, numbers.shape, dtype=torch.float32)

    def __init__(self, numbers: torch.Tensor) -> None:
        self.numbers = numbers

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.ops.aten.detach.default:
            return cls(args[0].numbers)
        raise NotImplementedError(f"{function} of a quantised tensor")


@pytest.mark.parametrize(
    "config", [dk.GoatConfig(r=1, target_modules=["body"]), dk.EtherConfig(target_modules=["body"])]
)
def test_quantised_weights(config: Any) -> None:
    model = Classifier()
    numbers = torch.randint(-8, 8, (8, 8), dtype=torch.int8)
    model.body.weight = nn.Parameter(Quantised(numbers), requires_grad=False)
    with pytest.raises(TypeError, match=r"target module 'body' must be .* float weight, got Linear \(a Quantised\)"):
        peft.get_peft_model(model, config)


CONFIGS = [
    lambda name: dk.GoatConfig(r=1, num_experts=2, target_modules=[name]),
    lambda name: dk.EtherConfig(target_modules=[name]),
    lambda name: dk.EtherPlusConfig(target_modules=[name]),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("name", ["linear1", "linear2", "out_proj"])
def test_an_encoder_layers_fast_path(config: Any, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It reads weights and calls nothing; without it the adapter counts. Attention never calls its
    own.
    """
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
    with pytest.raises(ValueError, match=rf"target module .*{name}' must be a layer that is called"):
        peft.get_peft_model(layer, config(name))
    if name == "out_proj":
        return
    previous = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        model = peft.get_peft_model(layer, config(name)).eval()
        for parameter in model.parameters():
            if parameter.requires_grad:
                nn.init.normal_(parameter)
        x = torch.randn(1, 3, 8)
        with torch.no_grad():
            adapted = model(x)
            with model.disable_adapter():
                assert not torch.allclose(adapted, model(x))
    finally:
        torch.backends.mha.set_fastpath_enabled(previous)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("family", ["Mamba", "Mamba2"])
def test_what_mambas_kernels_take(config: Any, family: str) -> None:
    transformers = pytest.importorskip("transformers")
    sizes: dict[str, Any] = {"vocab_size": 16, "hidden_size": 16, "state_size": 4, "num_hidden_layers": 1}
    if family == "Mamba2":
        sizes |= {"num_heads": 4, "head_dim": 8, "n_groups": 1}
    make = lambda: getattr(transformers, f"{family}ForCausalLM")(getattr(transformers, f"{family}Config")(**sizes))  # noqa: E731
    for name in ["out_proj"] if family == "Mamba2" else ["out_proj", "dt_proj", "x_proj"]:
        with pytest.raises(ValueError, match=rf"mixer.{name}' must be a layer that is called"):
            peft.get_peft_model(make(), config(name))
    peft.get_peft_model(make(), config("in_proj"))
