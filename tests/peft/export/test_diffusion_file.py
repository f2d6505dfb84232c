"""export_lora's file of a diffusion model's adapters, read without diffusers: W' of each layer from
the file against PEFT's own merge; what is refused, and that nothing is written then.
"""

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import adapted_convolutions
import peft
import pytest
import torch
from exports import state
from peft.tuners.tuners_utils import BaseTunerLayer
from peft_models import config
from safetensors import safe_open
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.export.export_lora import export_lora

FILE = "pytorch_lora_weights.safetensors"


class Mixed(nn.Module):
    def __init__(self, dims: int = 2) -> None:
        super().__init__()
        self.net = adapted_convolutions.Net(dims)
        self.third = nn.Linear(6, 4)


def made(method: str, seed: int, dims: int = 2, targets: str = r"net\.\w+|third", **options: Any) -> Any:
    torch.manual_seed(seed)
    model = peft.inject_adapter_in_model(config(method, target_modules=targets, **options), Mixed(dims).double())
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return model


def read(folder: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    with safe_open(folder / FILE, "pt") as file:
        return {name: file.get_tensor(name) for name in file.keys()}, file.metadata()  # noqa: SIM118


@pytest.mark.parametrize("dims", [1, 2, 3])
@pytest.mark.parametrize("method", ["lora", "rslora", "dora"])
def test_weights_of_the_file(method: str, dims: int, seed: int, tmp_path: Path) -> None:
    """The shapes are those of PEFT's own tensors; the scale is 1."""
    model = made(method, seed, dims, rank_pattern={"third": 2})
    dk.accelerate(model, strict=True)
    before = state(model)
    result = export_lora({"unet": model}, tmp_path, format="diffusers")
    assert str(state(model)) == str(before)
    assert result.ranks == {"unet.net.first": 3, "unet.net.second": 3, "unet.third": 2}
    tensors, metadata = read(tmp_path)
    settings = json.loads(metadata["lora_adapter_metadata"])
    assert (settings["unet.r"], settings["unet.lora_alpha"]) == (3, 3)
    assert settings["unet.use_dora"] == (method == "dora")
    layers = {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}
    for name, layer in layers.items():
        A, B = (tensors.pop(f"unet.{name}.lora_{role}.weight") for role in "AB")
        assert (A.shape, B.shape) == (layer.lora_A["default"].weight.shape, layer.lora_B["default"].weight.shape)
        base = layer.get_base_layer().weight
        updated = base + (B.flatten(1) @ A.flatten(1)).view(base.shape)
        if method == "dora":
            magnitude = tensors.pop(f"unet.{name}.lora_magnitude_vector")
            assert magnitude.shape == layer.lora_magnitude_vector["default"].weight.shape
            lengths = updated.flatten(1).norm(dim=1)
            updated = updated * (magnitude.flatten() / lengths).view(-1, *[1] * (base.dim() - 1))
        if dims == 3 and name == "net.second":  # of this shape PEFT can't merge
            continue
        layer.merge()
        torch.testing.assert_close(updated, layer.get_base_layer().weight, rtol=1e-12, atol=1e-12)
    assert not tensors


def test_stacked_and_named(seed: int, tmp_path: Path) -> None:
    """Two active LoRA adapters on a convolution; one by name."""
    model = made("lora", seed)
    peft.inject_adapter_in_model(config("lora", r=2, target_modules=["net.first"]), model, adapter_name="other")
    for layer in model.modules():
        if isinstance(layer, BaseTunerLayer):
            layer.set_adapter(["default", "other"])
    for adapter, rank in {None: 5, "other": 2}.items():
        assert export_lora({"unet": model}, tmp_path, adapter, format="diffusers").ranks["unet.net.first"] == rank
        tensors, layer = read(tmp_path)[0], model.net.first
        names = ["default", "other"] if adapter is None else [adapter]
        delta = sum(layer.get_delta_weight(name) for name in names)
        A, B = (tensors[f"unet.net.first.lora_{role}.weight"].flatten(1) for role in "AB")
        torch.testing.assert_close((B @ A).view(delta.shape), delta, rtol=1e-12, atol=1e-12)


def test_adapter_that_one_model_lacks(seed: int, tmp_path: Path) -> None:
    """That model is left out, as one without an active adapter is; an error names all of them."""
    models = {"unet": made("lora", seed, targets="third"), "text_encoder": Mixed()}
    models["text_encoder_2"] = own(seed, dk.nn.LoRALinear)
    options = config("lora", r=2, target_modules=["third"])
    peft.inject_adapter_in_model(options, models["text_encoder"], adapter_name="a")
    ranks = {"text_encoder.third": 2, "text_encoder_2.third": 2}
    assert export_lora(models, tmp_path, "a", format="diffusers").ranks == ranks
    assert {name.split(".")[0] for name in read(tmp_path)[0]} == {"text_encoder", "text_encoder_2"}
    expected = r"must be None or one of \['default'\] of unet, \['a'\] of text_encoder, \[\] of text_encoder_2, got 'b'"
    with pytest.raises(ValueError, match=f"adapter {expected}"):
        export_lora(models, tmp_path / "new", "b", format="diffusers")
    assert not (tmp_path / "new").exists()


def test_dtypes(seed: int, tmp_path: Path) -> None:
    """Each tensor in its own dtype, or in the one that is asked for."""
    model = made("dora", seed)
    model.net.first.lora_magnitude_vector["default"].float()
    for dtype, expected in {None: torch.float32, torch.bfloat16: torch.bfloat16}.items():
        export_lora({"transformer": model}, tmp_path, dtype=dtype, format="diffusers")
        tensors = read(tmp_path)[0]
        assert tensors["transformer.net.first.lora_magnitude_vector"].dtype == expected
        assert tensors["transformer.net.first.lora_A.weight"].dtype == dtype or torch.float64


def grouped(seed: int, **options: Any) -> Any:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(4, 6, 3, **options))
    return peft.inject_adapter_in_model(config("lora", r=2, target_modules=["0"]), model)


def merged(seed: int) -> Any:
    model = made("lora", seed)
    model.third.merge()
    return model


def disabled(seed: int) -> Any:
    model = made("lora", seed)
    model.third.enable_adapters(False)
    return model


def beside(seed: int) -> Any:
    model = made("dora", seed, targets="net.first")
    other = config("lora", r=2, target_modules=["net.first"])
    peft.inject_adapter_in_model(other, model, adapter_name="other")
    model.net.first.set_adapter(["default", "other"])
    return model


def some_dora(seed: int) -> Any:
    model = made("dora", seed, targets="net.first")
    other = config("lora", r=2, target_modules=["third"])
    peft.inject_adapter_in_model(other, model, adapter_name="other")
    for layer in (model.net.first, model.third):
        layer.set_adapter(["default", "other"])
    return model


def trained_beside(seed: int) -> Any:
    torch.manual_seed(seed)
    return peft.get_peft_model(Mixed(), config("lora", target_modules=["third"], modules_to_save=["second"]))


def trains(seed: int, *names: str) -> Any:
    model = made("lora", seed, targets="net.first")
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model


def own(seed: int, adapter: Any, *names: str, kind: type[Mixed] = Mixed) -> Any:
    torch.manual_seed(seed)
    model: Any = kind().requires_grad_(False)
    model.third = adapter(6, 4, r=2)
    for name in names:
        model.get_parameter(name).requires_grad_(True)
    return model


REFUSED: dict[str, tuple[Callable[[int], Any], str, str]] = {
    "groups": (
        lambda seed: grouped(seed, groups=2),
        "diffusers",
        "layer '0' must be a low-rank term on a plain convolution, got a convolution with groups.*save_lora_adapter",
    ),
    "dilation": (lambda seed: grouped(seed, dilation=2), "diffusers", "a convolution with groups, dilation"),
    "padding": (
        lambda seed: grouped(seed, padding=1, padding_mode="circular"),
        "diffusers",
        "another padding than zeros",
    ),
    "bias": (
        lambda seed: made("lora", seed, lora_bias=True),
        "diffusers",
        "plain convolution.*lora_bias=True.*fuse_lora",
    ),
    "merged": (merged, "diffusers", r"'third' must be unmerged, got a merged adapter.*unfuse_lora\(\)"),
    "disabled": (disabled, "diffusers", r"'third' must be enabled, got disabled adapters.*enable_lora\(\)"),
    "DoRA beside": (beside, "diffusers", "DoRA beside another adapter"),
    "some DoRA": (some_dora, "diffusers", "layer 'third' must be a low-rank term on a plain linear, got no DoRA"),
    "trained beside": (trained_beside, "diffusers", "a module trained beside the adapters"),
    "base biases": (lambda seed: made("lora", seed, bias="all"), "diffusers", "trained biases"),
    "a bias of an adapted layer": (
        lambda seed: trains(seed, "net.first.base_layer.bias"),
        "diffusers",
        "parameter 'net.first.bias' must be frozen, got one that trains, which these files don't hold; save it",
    ),
    "another layer": (lambda seed: trains(seed, "third.weight"), "diffusers", "parameter 'third.weight' must be"),
    "an own bias": (
        lambda seed: own(seed, dk.nn.DeLoRALinear, "third.bias"),
        "diffusers",
        "parameter 'third.bias' must be frozen",
    ),
    "an own bias of LoRA": (
        lambda seed: own(seed, dk.nn.LoRALinear, "third.bias"),
        "kohya",
        "parameter 'third.bias' must",
    ),
    "beside own": (
        lambda seed: own(seed, dk.nn.LoRALinear, "net.first.bias"),
        "diffusers",
        "parameter 'net.first.bias' must be",
    ),
    "nothing": (lambda seed: Mixed(), "diffusers", "one with DeLoRA or LoRA layers, got none"),
    "not kohya's": (lambda seed: made("lora", seed), "kohya", "got a Mixed as 'unet'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, seed: int, tmp_path: Path) -> None:
    make, format, reason = REFUSED[case]
    with pytest.raises(ValueError, match=reason):
        export_lora({"unet": make(seed)}, tmp_path / "new", format=format)
    assert not (tmp_path / "new").exists()


class UNet2DConditionModel(Mixed):
    """By its name, and of SDXL by its config."""

    config = SimpleNamespace(addition_embed_type="text_time")


class CLIPTextModel(Mixed):
    pass


@pytest.mark.parametrize(
    ("others", "prefixes"),
    [
        ({}, {"lora_te"}),
        ({"unet": UNet2DConditionModel}, {"lora_te1"}),
        ({"text_encoder_2": CLIPTextModel}, {"lora_te1"}),
        ({"text_encoder_2": lambda: own(0, dk.nn.LoRALinear, kind=CLIPTextModel)}, {"lora_te1", "lora_te2"}),
    ],
)
def test_kohyas_text_encoders(others: dict[str, Any], prefixes: set[str], seed: int, tmp_path: Path) -> None:
    """SDXL's first one, by what stands beside it, with adapters or without."""
    models = {name: make() for name, make in others.items()}
    models["text_encoder"] = own(seed, dk.nn.LoRALinear, kind=CLIPTextModel)
    export_lora(models, tmp_path, format="kohya")
    assert {name.partition("_text_model_")[0] for name in read(tmp_path)[0]} == prefixes


@pytest.mark.parametrize("kind", [dk.nn.LoRALinear, dk.nn.DeLoRALinear])
def test_own_modules(kind: Any, seed: int, tmp_path: Path) -> None:
    """What PEFT's wrappers train for an adapter that is not exported is no obstacle."""
    model = own(seed, kind, "third.B")
    with torch.no_grad():
        model.third.B += torch.randn_like(model.third.B)
    for name, saved in {"default": ["second"], "other": None}.items():
        options = config("lora", r=1, target_modules=["net.first"], modules_to_save=saved)
        peft.inject_adapter_in_model(options, model, adapter_name=name)
    for parameter in model.net.second.parameters():
        parameter.requires_grad_(True)
    ranks = export_lora({"unet": model}, tmp_path, "other", format="diffusers").ranks
    assert ranks == {"unet.net.first": 1, "unet.third": 2}
    A, B = (read(tmp_path)[0][f"unet.third.lora_{role}.weight"] for role in "AB")
    weight = model.third.weight.clone()
    model.third.merge()
    torch.testing.assert_close(weight + B @ A, model.third.weight)


@pytest.mark.parametrize(
    ("model", "format", "error", "reason"),
    [
        (made("lora", 0), "diffusers", ValueError, 'got a Mixed; pass {"text_encoder": model}'),
        ({"decoder": made("lora", 0)}, "diffusers", ValueError, "got 'decoder': a Mixed"),
        ({"unet": 3}, "diffusers", ValueError, "got 'unet': a int"),
        ({"unet": made("lora", 0)}, "peft", TypeError, "model must be a torch.nn.Module, got dict"),
        (made("lora", 0), "a1111", ValueError, "format must be one of"),
    ],
)
def test_arguments(model: Any, format: str, error: type[Exception], reason: str, tmp_path: Path) -> None:
    with pytest.raises(error, match=reason):
        export_lora(model, tmp_path / "new", format=format)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("format", ["diffusers", "kohya"])
def test_experts_are_pefts_alone(format: str, seed: int, tmp_path: Path) -> None:
    expected = "experts must be 'fused' with a file of a diffusion model, which holds no experts, got 'per_expert'"
    with pytest.raises(ValueError, match=f"{expected}.*format=.peft"):
        export_lora({"unet": made("lora", seed)}, tmp_path / "new", format=format, experts="per_expert")
    assert not (tmp_path / "new").exists()
