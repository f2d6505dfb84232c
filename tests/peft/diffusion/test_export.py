"""export_lora's files of diffusion models, loaded back by diffusers, and recomputed from the file
layer by layer: W' of the file against the weight that the model computes with.
"""

from pathlib import Path
from typing import Any

import pytest
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file
from torch import Tensor, nn

pytest.importorskip("diffusers", reason="diffusers is not installed (make test-diffusers)")

from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers
from diffusion_models import adapt, base_of, inputs, output

import delora_kernels as dk

SDXL = {"add_embedding.linear_1": "label_emb_0_0", "add_embedding.linear_2": "label_emb_0_2"}
FILE = "pytorch_lora_weights.safetensors"


def adapted_layers(model: nn.Module) -> dict[str, Any]:
    return {name: layer for name, layer in model.named_modules() if isinstance(layer, BaseTunerLayer)}


def merged_weights(model: Any) -> dict[str, Tensor]:
    """W' of every adapted layer, by PEFT's own merge; the model is merged afterwards."""
    for layer in adapted_layers(model).values():
        layer.merge()
    return {name: layer.get_base_layer().weight.detach().clone() for name, layer in adapted_layers(model).items()}


def weight_of(tensors: dict[str, Tensor], key: str, base: Tensor) -> Tensor:
    """W' by LyCORIS's rule: W + alpha / r · up down; of DoRA with rows of length dora_scale."""
    down, up, alpha = (tensors.pop(f"{key}.{part}") for part in ("lora_down.weight", "lora_up.weight", "alpha"))
    assert down.shape[1:] == base.shape[1:]
    assert up.shape[2:].numel() == 1
    delta = (up.flatten(1) @ down.flatten(1) * (alpha.item() / down.shape[0])).view(base.shape)
    scale = tensors.pop(f"{key}.dora_scale", None)
    if scale is None:
        return base + delta
    assert scale.shape == (len(base), *[1] * (base.dim() - 1))
    norm = (base + delta).flatten(1).norm(dim=1).view(scale.shape)
    return (base + delta) * (scale / norm)


def same(ours: Tensor, theirs: Tensor) -> None:
    assert (ours - theirs).abs().max() <= 1e-11 * theirs.abs().max()


@pytest.mark.parametrize("kind", ["unet", "sd3"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_diffusers_loads_it(method: str, kind: str, seed: int, tmp_path: Path) -> None:
    """Ranks and scales that differ; into the model by its own loader, with the file's metadata and,
    as older versions read it, without.
    """
    ends = {"to_k": 5, "proj_out": 2}
    made, call = adapt(base_of(kind, seed), method, rank_pattern=ends), inputs(kind, seed)
    if method != "delora":
        made.set_adapters("default", weights=0.6)
    dk.accelerate(made, strict=True)
    result = dk.export_lora(made, tmp_path, format="diffusers")
    name = "unet" if kind == "unet" else "transformer"
    assert set(result.ranks) == {f"{name}.{layer}" for layer in adapted_layers(made)}
    assert sorted(set(result.ranks.values())) == [2, 3, 5]
    assert [file.name for file in tmp_path.iterdir()] == [FILE]
    assert result.bytes == (tmp_path / FILE).stat().st_size
    loaded = base_of(kind, seed)
    loaded.load_lora_adapter(tmp_path, prefix=name, use_safetensors=True)
    same(output(loaded, call), output(made, call))
    assert {str(p.requires_grad) for n, p in loaded.named_parameters() if "lora_" in n} == {"True"}
    loaded = base_of(kind, seed)
    loaded.load_lora_adapter(load_file(tmp_path / FILE), prefix=name)
    same(output(loaded, call), output(made, call))


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_kohyas_format(method: str, seed: int, tmp_path: Path) -> None:
    """A U-Net and its text encoder in one file: each W' by the format's rule; diffusers' converter
    takes all but dora_scale, of which it wants PEFT's shape.
    """
    made = {"unet": adapt(base_of("unet", seed), method, rank_pattern={"to_k": 5})}
    made["text_encoder"] = adapt(base_of("text_encoder", seed), method)
    for model in made.values():
        dk.accelerate(model, strict=True)
    dk.export_lora(made, tmp_path, format="kohya")
    call = inputs("unet", seed)
    expected = output(made["unet"], call)
    tensors = load_file(tmp_path / FILE)
    taken = dict(tensors)
    for component, prefix in {"unet": "lora_unet_", "text_encoder": "lora_te1_text_model_"}.items():
        bases = adapted_layers(made[component])
        bases = {name: layer.get_base_layer().weight.detach().clone() for name, layer in bases.items()}
        for name, weight in merged_weights(made[component]).items():
            same(weight_of(tensors, prefix + SDXL.get(name, name.replace(".", "_")), bases[name]), weight)
    assert not tensors
    if method == "dora":
        for key in [key for key in taken if key.endswith("dora_scale")]:
            taken[key] = taken[key].flatten() if taken[key].dim() == 2 else taken[key].transpose(0, 1)
    converted, alphas = _convert_non_diffusers_lora_to_diffusers(taken)
    loaded = base_of("unet", seed)
    loaded.load_lora_adapter(converted, prefix="unet", network_alphas=alphas)
    same(output(loaded, call), expected)
