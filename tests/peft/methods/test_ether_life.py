"""What PEFT lets people do with an adapter, done with ETHER's: save, load, switch, delete, target,
cast.
"""

import copy
import json
from pathlib import Path

import peft
import pytest
import torch
from adapter_life import (
    batch,
    check_goes_on,
    check_loaded_switched_and_deleted,
    load,
    outputs_of_each,
    train,
)
from ether_models import KINDS, config, layers, model, move, small
from safetensors.torch import load_file
from tiny_llama import base, tokens

import delora_kernels as dk

both_methods = pytest.mark.parametrize("kind", ["ether", "ether+"])


@pytest.mark.parametrize(
    ("kind", "low_cpu_mem_usage", "dtype"),
    [(kind, False, torch.float64) for kind in KINDS] + [(kind, True, torch.bfloat16) for kind in ("ether", "ether+")],
)
def test_saved_and_loaded_it_goes_on_bit_for_bit(
    kind: str, low_cpu_mem_usage: bool, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    onto, x = small(seed, dtype), batch(seed, dtype)
    made = model(onto, kind)
    train(made, x)
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert len(saved) == sum(p.requires_grad for p in made.parameters())
    plus, told = KINDS[kind][0], json.loads((tmp_path / "adapter_config.json").read_text())
    assert told["peft_type"] == ("ETHER_PLUS" if plus else "ETHER")
    assert all((".etherplus_" if plus else ".ether_") in key for key in saved)
    again = load(tmp_path, onto, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    check_goes_on(again, made, x)


@both_methods
def test_training_leaves_the_base_alone_and_disabled_it_is_the_base(kind: str, seed: int) -> None:
    onto, x = small(seed, torch.bfloat16), batch(seed, torch.bfloat16)
    made = model(onto, kind, moved=False)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    train(made, x)
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".ether" in name}
    with made.disable_adapter():
        assert torch.equal(made(x), onto(x))
    assert not torch.equal(made(x), onto(x))
    assert torch.equal(made.unload()(x), onto(x))


@both_methods
def test_loaded_beside_another_switched_and_deleted(kind: str, seed: int, tmp_path: Path) -> None:
    """Two adapters of different sizes on different layers: each alone is what it was, a file holds
    one of them.
    """
    onto, x = small(seed), batch(seed)
    made = model(onto, kind)
    made.add_adapter("other", config(kind, n_blocks=1, side="output", target_modules=["first", "third"]))
    assert not any(p.requires_grad for name, p in made.named_parameters() if name.endswith(".other"))
    made.set_adapter("other")
    move(made)
    outputs = outputs_of_each(made, onto, x, ".ether")
    made.save_pretrained(tmp_path)
    again = check_loaded_switched_and_deleted(tmp_path, onto, x, outputs)
    assert not any("two" in layer.options for layer in layers(again).values())


@both_methods
def test_layers_are_chosen_as_in_peft(kind: str, seed: int) -> None:
    llama = base(seed)
    options = {"target_modules": ["q_proj", "up_proj"], "exclude_modules": [r"1.self_attn.q_proj"]}
    made = peft.get_peft_model(
        llama,
        config(kind, **options, layers_to_transform=[1], modules_to_save=["lm_head"], task_type="CAUSAL_LM"),
    )
    assert [name.split("model.layers.")[1] for name in layers(made)] == ["1.mlp.up_proj"]
    assert any("lm_head.modules_to_save" in name for name, p in made.named_parameters() if p.requires_grad)
    assert "ether.PeftEther" in repr(made)
    status = made.get_model_status()
    assert (status.num_adapter_layers, status.peft_types) == (
        1 + 1,  # and what modules_to_save wraps
        {"default": "ETHER_PLUS" if KINDS[kind][0] else "ETHER"},
    )


def test_modules_to_save_are_saved(seed: int, tmp_path: Path) -> None:
    onto, x = small(seed), batch(seed)
    made = model(onto, "ether+", target_modules=["first"], modules_to_save=["third"])
    train(made, x)
    made.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, onto)(x), made.eval()(x))


@both_methods
@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_pefts(kind: str, autocast: bool, dtype: torch.dtype, seed: int) -> None:
    made = peft.get_peft_model(small(seed, dtype), config(kind), autocast_adapter_dtype=autocast)
    vectors = [p for p in made.parameters() if p.requires_grad]
    assert {p.dtype for p in vectors} == {torch.float32 if autocast else dtype}
    y = made(batch(seed, dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in vectors)
    with torch.autocast("cpu", torch.bfloat16):
        assert made(batch(seed, dtype)).dtype == torch.bfloat16


@both_methods
def test_injected_without_a_peft_model(kind: str, seed: int) -> None:
    onto, x = small(seed), batch(seed)
    made = peft.inject_adapter_in_model(config(kind), copy.deepcopy(onto))
    move(made)
    again = peft.inject_adapter_in_model(config(kind), copy.deepcopy(onto))
    peft.set_peft_model_state_dict(again, peft.get_peft_model_state_dict(made))
    assert torch.equal(again(x), made(x))


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, seed: int) -> None:
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(base(seed), dk.EtherPlusConfig(n_blocks=4, **options))
    ids, grads = tokens(seed, 2, 5), []
    for checkpointing in (False, True):
        if checkpointing:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            made.enable_input_require_grads()
        made.zero_grad()
        made.train()(input_ids=ids, labels=ids, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
    assert len(grads[0]) == 4 * 4
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_whole_model_on_a_device_map(seed: int, tmp_path: Path) -> None:
    """Dispatched by Hugging Face accelerate, before and after: hooks that only move inputs change
    nothing.
    """
    hf = pytest.importorskip("accelerate")
    made = peft.get_peft_model(base(seed), dk.EtherConfig(n_blocks=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    ids = tokens(seed, 2, 5)
    logits = made(ids).logits
    hf.dispatch_model(made, {"": "cpu"}, force_hooks=True)
    assert torch.equal(made(ids).logits, logits)
    made.save_pretrained(tmp_path)
    onto = hf.dispatch_model(base(seed), {"": "cpu"}, force_hooks=True)
    assert torch.equal(peft.PeftModel.from_pretrained(onto, tmp_path)(ids).logits, logits)


def test_deep_copy_is_another_model(seed: int) -> None:
    made, x = model(small(seed), "ether+"), batch(seed)
    again = copy.deepcopy(made)
    assert torch.equal(again(x), made(x))
    train(again, x)
    assert not torch.equal(again(x), made(x))
