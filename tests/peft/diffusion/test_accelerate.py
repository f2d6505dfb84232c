"""Diffusion models of diffusers under accelerate(): every layer fused, PEFT's numbers, and what
diffusers does with adapters (scales, switches, fusing into the base, files) as without it.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

pytest.importorskip("diffusers", reason="diffusers is not installed (make test-diffusers)")

from diffusion_models import ALL, LINEAR, MODELS, adapt, assert_same, base_of, inputs, output, step, targets

import delora_kernels as dk

GROUPS = {
    "unet": {"to_q + to_k + to_v": 4, "to_k + to_v": 4},
    "sd3": {"to_q + to_k + to_v": 3, "add_q_proj + add_k_proj + add_v_proj": 2},
    "flux": {"to_q + to_k + to_v": 2, "add_q_proj + add_k_proj + add_v_proj": 1},
    "text_encoder": {"q_proj + k_proj + v_proj": 2},
}
"""What shares an input: attention to itself, attention to the text."""


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_every_layer_is_fused(method: str, kind: str, seed: int) -> None:
    """Linears and convolutions; output and every gradient, also of the pass in which siblings run
    as one call.
    """
    made, call = adapt(base_of(kind, seed), method), inputs(kind, seed)
    theirs, keys = step(made, call), list(made.state_dict())
    report = dk.accelerate(made, strict=True)
    wanted = len(targets(MODELS[kind](), LINEAR if method == "delora" else ALL))
    assert len(report.fused) == len(report.layers) == wanted
    for _ in range(3):
        assert_same(step(made, call), theirs)
    groups = Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in report.groups)
    assert groups == GROUPS[kind]
    assert list(made.state_dict()) == keys
    assert dk.restore(made) == wanted
    assert_same(step(made, call), theirs)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_diffusers_own_ways(method: str, seed: int) -> None:
    """Scales, switches and fusing into the base, with the adapter accelerated and not."""
    plain, made = (adapt(base_of("unet", seed), method) for _ in range(2))
    made.load_state_dict(plain.state_dict())
    call = inputs("unet", seed)
    dk.accelerate(made, strict=True)

    def same() -> torch.Tensor:
        with torch.no_grad():
            ours, theirs = output(made, call), output(plain, call)
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
        return ours

    whole = same()
    for model in (plain, made):
        model.set_adapters("default", weights=0.3)
    assert not torch.allclose(same(), whole)
    for model in (plain, made):
        model.disable_lora()
    base = same()
    for model in (plain, made):
        model.enable_lora()
        model.set_adapters("default")
    torch.testing.assert_close(same(), whole, rtol=1e-12, atol=1e-12)
    for model in (plain, made):
        model.fuse_lora(lora_scale=0.7)
    same()
    for model in (plain, made):
        model.unfuse_lora()
        model.set_adapters("default")
    torch.testing.assert_close(same(), whole, rtol=1e-9, atol=1e-9)
    for model in (plain, made):
        model.unload_lora()
    torch.testing.assert_close(same(), base, rtol=1e-9, atol=1e-9)


def test_two_adapters_with_weights(seed: int) -> None:
    made, call = adapt(base_of("unet", seed), "lora"), inputs("unet", seed)
    adapt(made, "lora", "other", r=2)
    made.set_adapters(["default", "other"], weights=[0.4, 1.7])
    theirs = step(made, call)
    dk.accelerate(made, strict=True)
    assert_same(step(made, call), theirs)
    made.delete_adapters("other")
    made.set_adapter("default")
    ours = output(made, call)
    dk.restore(made)
    torch.testing.assert_close(ours, output(made, call), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("kind", ["unet", "flux"])
def test_files_bit_for_bit(kind: str, method: str, seed: int, tmp_path: Path) -> None:
    """What an accelerated model saves is what it would have saved, and loads into an accelerated
    one.
    """
    made, call = adapt(base_of(kind, seed), method), inputs(kind, seed)
    made.save_lora_adapter(tmp_path / "before")
    dk.accelerate(made, strict=True)
    made.save_lora_adapter(tmp_path / "after")
    before, after = (_read(tmp_path / name) for name in ("before", "after"))
    assert before[1] == after[1]
    assert list(before[0]) == list(after[0])
    assert all(torch.equal(tensor, after[0][name]) for name, tensor in before[0].items())
    loaded = base_of(kind, seed)
    loaded.load_lora_adapter(tmp_path / "after", prefix=None, use_safetensors=True)
    dk.accelerate(loaded, strict=True)
    found = loaded.state_dict()
    for name, tensor in made.state_dict().items():
        assert torch.equal(found[name.replace(".default.", ".default_0.")], tensor)
    assert torch.equal(output(loaded, call), output(made, call))


def _read(folder: Path) -> tuple[dict[str, torch.Tensor], Any]:
    """The tensors of the one file in a folder, and its metadata, whose order a file leaves open."""
    (file,) = folder.iterdir()
    with safe_open(file, "pt") as opened:
        return {name: opened.get_tensor(name) for name in opened.keys()}, opened.metadata()  # noqa: SIM118
