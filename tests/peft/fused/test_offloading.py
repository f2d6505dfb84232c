"""Hugging Face accelerate's hooks (device_map, dispatch_model, offloading) on PEFT models:
respected, and named.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import METHODS, assert_close, config, model, step
from torch import Tensor, nn

pytest.importorskip("accelerate")
pytest.importorskip("transformers")

import accelerate as hf
import peft
import transformers
from accelerate.hooks import ModelHook, add_hook_to_module, remove_hook_from_module
from tiny_llama import LAYERS, base, llama, tokens

import delora_kernels as dk

torch.set_num_threads(1)


def run(made: Any, batch: Tensor, grads: bool = True) -> dict[str, Tensor]:
    """Logits and, with `grads`, every gradient by name."""
    made.zero_grad()
    with torch.set_grad_enabled(grads):
        logits = made(batch).logits
    if grads:
        logits.square().sum().backward()
    found = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {"y": logits.detach()} | found


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_device_map(method: str, seed: int, tmp_path: Path) -> None:
    """device_map on one device puts no hooks anywhere: everything is fused."""
    base(seed).save_pretrained(tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, device_map={"": "cpu"}).double()
    options = {"r": 4, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    torch.manual_seed(seed)
    made = peft.get_peft_model(loaded, config(method, **options))
    theirs = run(made, tokens(seed, 2, 5))
    assert len(dk.accelerate(made, strict=True).fused) == LAYERS
    assert_close(run(made, tokens(seed, 2, 5)), theirs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_dispatched(method: str, when: str, seed: int) -> None:
    """dispatch_model's hooks on every module that only move inputs: all is fused, accelerated
    before or after it.
    """
    made, batch = llama(method, seed, torch.float64), tokens(seed, 2, 5)
    theirs = run(made, batch)
    if when == "before":
        dk.accelerate(made, strict=True)
    hf.dispatch_model(made, {"": "cpu"}, force_hooks=True)
    assert len(dk.accelerate(made, strict=True).fused) == LAYERS
    assert_close(run(made, batch), theirs)
    hf.hooks.remove_hook_from_submodules(made)
    assert len(dk.accelerate(made, strict=True).fused) == LAYERS
    assert_close(run(made, batch), theirs)


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["cpu", "disk"])
def test_offloaded(where: str, when: str, seed: int, tmp_path: Path) -> None:
    """Weights that lie on the CPU or on disk and come for each call: the layer's own hooks bring
    them, PEFT runs.
    """
    made, batch = llama("lora", seed), tokens(seed, 2, 5)
    theirs = run(made, batch, grads=False)
    if when == "before":
        dk.accelerate(made, strict=True)
    if where == "cpu":
        hf.cpu_offload(made, execution_device="cpu")
    else:
        hf.disk_offload(made, str(tmp_path), execution_device="cpu")
    assert all(parameter.is_meta for parameter in made.parameters())
    assert torch.equal(run(made, batch, grads=False)["y"], theirs["y"])
    report = dk.accelerate(made)
    assert {layer.reason for layer in report.layers} == {"the base layer has a forward of its own"}
    assert torch.equal(run(made, batch, grads=False)["y"], theirs["y"])


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_device_map_with_disk(method: str, seed: int, tmp_path: Path) -> None:
    """The first block comes from disk at each call, the second has adapters: its base layers have
    hooks too.
    """
    base(seed, torch.float64).save_pretrained(tmp_path / "base")
    places = dict.fromkeys(("model.embed_tokens", "model.layers.1", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    places |= {"model.layers.0": "disk"}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", device_map=places, offload_folder=str(tmp_path / "offload"), dtype=torch.float64
    )
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": r".*layers\.1\..*_proj", "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(loaded, config(method, **options))
    theirs = run(made, tokens(seed, 2, 5))
    assert all(hasattr(module, "_hf_hook") for name, module in made.named_modules() if name.endswith("base_layer"))
    assert len(dk.accelerate(made, strict=True).fused) == 7
    assert_close(run(made, tokens(seed, 2, 5)), theirs)


class Doubles(ModelHook):
    """What no library may lose: a hook that changes what goes in and what comes out."""

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return tuple(arg + 1 for arg in args), kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        return 2 * output


@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize("where", ["layer", "base_layer", "adapter"])
@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_change_things(method: str, where: str, when: str, seed: int) -> None:
    """A hook on the layer, its base or its adapter runs, whichever came first; removed, the layer
    is fused.
    """
    made, eager = model(method, seed), model(method, seed)
    x = torch.randn(3, 12, generator=torch.Generator().manual_seed(seed))

    def hooked(one: Any) -> nn.Module:
        layer = one.base_model.model.first
        adapter = layer.delora_dropout if method == "delora" else layer.lora_B
        owner: nn.Module = {"layer": layer, "base_layer": layer.base_layer, "adapter": adapter["default"]}[where]
        return owner

    plain = step(eager, x)
    if when == "before":
        dk.accelerate(made, strict=True)
    for one in (made, eager):
        add_hook_to_module(hooked(one), Doubles())
    report = dk.accelerate(made)
    theirs = step(eager, x)
    assert not torch.allclose(theirs["y"], plain["y"])
    assert_close(step(made, x), theirs)
    assert [one.name.rsplit(".", 1)[-1] for one in report.declined] == ["first"]
    remove_hook_from_module(hooked(made))
    assert len(dk.accelerate(made, strict=True).fused) == 3
    assert_close(step(made, x), plain)
