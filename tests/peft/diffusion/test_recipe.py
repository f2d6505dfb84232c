"""The DreamBooth recipe of docs/recipes/diffusers-vit.md, run on tiny models with random weights
and generated pictures: with PEFT alone its losses are the same but for rounding, its files alike.
"""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers", reason="diffusers is not installed (make test-diffusers)")

import diffusers
import transformers
from diffusion_models import text_encoder
from pages import blocks
from safetensors.torch import load_file

import delora_kernels as dk

STEPS = 6


def tiny_unet() -> Any:
    return diffusers.UNet2DConditionModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8, 16),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=2,
        norm_num_groups=4,
    )


def tiny_vae() -> Any:
    return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4)


def words(*_: Any, **__: Any) -> Any:
    return SimpleNamespace(input_ids=torch.arange(2, 9)[None])


def run(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The recipe's names after it ran in a folder, with few steps on small pictures."""
    (block,) = [each for each in blocks("docs/recipes/diffusers-vit.md") if each.not_run]
    text = block.text
    for given, small in {"range(100)": f"range({STEPS})", "512, 512": "8, 8", "r=16, lora_alpha=16": "r=2"}.items():
        assert text.count(given) == 1
        text = text.replace(given, small)
    folder.mkdir()
    monkeypatch.chdir(folder)
    torch.manual_seed(seed)
    names: dict[str, Any] = {}
    exec(compile(text, "diffusers-vit.md", "exec"), names)
    return names


def test_recipe(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made: dict[Any, Any] = {
        transformers.CLIPTextModel: text_encoder,
        diffusers.AutoencoderKL: tiny_vae,
        diffusers.UNet2DConditionModel: tiny_unet,
        diffusers.DDPMScheduler: diffusers.DDPMScheduler,
        transformers.CLIPTokenizer: lambda: words,
    }
    for kind, make in made.items():
        monkeypatch.setattr(kind, "from_pretrained", lambda *_, make=make, **__: make())
    ours = run(seed, tmp_path / "ours", monkeypatch)
    exported = load_file(tmp_path / "ours/exported/pytorch_lora_weights.safetensors")
    assert len(exported) == 3 * len(dk.accelerate(ours["unet"]).fused)
    monkeypatch.setattr(dk, "accelerate", lambda model, strict: "PEFT alone")
    theirs = run(seed, tmp_path / "theirs", monkeypatch)
    assert len(ours["losses"]) == STEPS
    # AdamW's first steps are of lr's size whatever a gradient is: roundings of those near 0 show
    assert ours["losses"] == pytest.approx(theirs["losses"], rel=1e-2)
    assert ours["losses"][0] == pytest.approx(theirs["losses"][0], rel=1e-5)
    for name in ("adapter", "exported"):
        files = [load_file(tmp_path / who / name / "pytorch_lora_weights.safetensors") for who in ("ours", "theirs")]
        assert files[0].keys() == files[1].keys()
