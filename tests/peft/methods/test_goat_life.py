"""What PEFT lets people do with an adapter, done with GOAT's: save, load, switch, delete, target,
cast, merge.
"""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from adapter_life import (
    batch,
    check_equal,
    check_goes_on,
    check_loaded_switched_and_deleted,
    load,
    outputs_of_each,
    train,
)
from goat_models import KINDS, config, layers, model, move, small
from golden_cases import relative_error
from safetensors.torch import load_file
from tiny_llama import LAYERS, base, tokens

import delora_kernels as dk


def goat_llama(seed: int) -> Any:
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    return peft.get_peft_model(base(seed), dk.GoatConfig(r=2, **options))


@pytest.mark.parametrize(
    ("kind", "low_cpu_mem_usage", "dtype"),
    [(kind, False, torch.float64) for kind in KINDS]
    + [(kind, True, torch.bfloat16) for kind in ("goat", "shared", "normalised")],
)
def test_saved_and_loaded_it_goes_on_bit_for_bit(
    kind: str, low_cpu_mem_usage: bool, dtype: torch.dtype, seed: int, tmp_path: Path
) -> None:
    onto, x = small(seed, dtype), batch(seed, dtype)
    made = model(onto, **KINDS[kind])
    train(made, x)
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert {key.split(".goat_")[-1].split(".")[0] for key in saved} <= {
        *("A", "B", "router", "lambda", "magnitude", "scale", "w_norm", "start_A", "start_B")
    }
    assert json.loads((tmp_path / "adapter_config.json").read_text())["peft_type"] == "GOAT"
    torch.manual_seed(seed + 1)  # another router, another random A, if they were not loaded
    again = load(tmp_path, onto, is_trainable=True, low_cpu_mem_usage=low_cpu_mem_usage)
    check_goes_on(again, made, x)


@pytest.mark.parametrize("low_cpu_mem_usage", [False, True])
def test_start_that_is_not_saved_is_made_again_or_refused(low_cpu_mem_usage: bool, seed: int, tmp_path: Path) -> None:
    onto, x = small(seed, torch.bfloat16), batch(seed, torch.bfloat16)
    made = model(onto, save_start=False)
    made.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert not any("start" in key for key in saved)
    again = load(tmp_path, onto, low_cpu_mem_usage=low_cpu_mem_usage)
    check_equal(again, made)
    for ours, theirs in zip(layers(again).values(), layers(made).values(), strict=True):
        assert torch.equal(ours.goat_start_B["default"], theirs.goat_start_B["default"])
    assert torch.equal(again(x), made.eval()(x))
    again.add_adapter("other", config())
    again.delete_adapter("other"), again.delete_adapter("default")
    again.add_adapter("default", config())  # under the name of one that was not saved
    assert sum("goat_start_A.default" in key for key in again.state_dict()) == 3
    with pytest.raises(RuntimeError, match="start of adapter 'default' can't be made again from this base weight"):
        load(tmp_path, small(seed + 1, torch.bfloat16), low_cpu_mem_usage=low_cpu_mem_usage)


def test_loaded_beside_another_switched_and_deleted(seed: int, tmp_path: Path) -> None:
    """Two adapters of different sizes on different layers: each alone is what it was, a file holds
    one of them.
    """
    onto, x = small(seed), batch(seed)
    made = model(onto)
    made.add_adapter("other", config(num_experts=3, r=1, target_modules=["first", "third"], init_weights=False))
    made.set_adapter("other")
    move(made)
    outputs = outputs_of_each(made, onto, x, "goat_")
    made.save_pretrained(tmp_path)
    for name, folder in (("default", tmp_path), ("other", tmp_path / "other")):
        assert torch.equal(load(folder, onto)(x), outputs[name])
    again = check_loaded_switched_and_deleted(tmp_path, onto, x, outputs)
    assert not any(
        "two" in getattr(layer, name) for layer in layers(again).values() for name in layer.other_param_names
    )


def test_layers_and_ranks_are_chosen_as_in_peft(seed: int) -> None:
    llama = base(seed)
    options = {"target_modules": ["q_proj", "up_proj"], "num_experts": 2, "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(
        llama,
        dk.GoatConfig(
            r=2, layers_to_transform=[1], rank_pattern={"up_proj": 3}, modules_to_save=["lm_head"], **options
        ),
    )
    found = {name.split("model.layers.")[1]: layer.r["default"] for name, layer in layers(made).items()}
    assert found == {"1.self_attn.q_proj": 2, "1.mlp.up_proj": 3}
    assert any("lm_head.modules_to_save" in name for name, p in made.named_parameters() if p.requires_grad)
    made = peft.get_peft_model(base(seed), dk.GoatConfig(r=2, exclude_modules=[r"0.mlp.up_proj", "q_proj"], **options))
    assert [name.split("model.layers.")[1] for name in layers(made)] == ["1.mlp.up_proj"]
    made = peft.get_peft_model(base(seed), dk.GoatConfig(r=2, target_modules="all-linear"))
    assert len(layers(made)) == LAYERS
    made.add_adapter("other", dk.GoatConfig(r=1, target_modules="all-linear"))
    assert len(layers(made)) == LAYERS
    assert "goat.PeftGoatLinear" in repr(made)
    status = made.get_model_status()
    assert (status.num_adapter_layers, status.peft_types) == (LAYERS, {"default": "GOAT", "other": "GOAT"})


def test_modules_to_save_are_saved(seed: int, tmp_path: Path) -> None:
    onto, x = small(seed), batch(seed)
    made = model(onto, target_modules=["first"], modules_to_save=["third"])
    train(made, x)
    made.save_pretrained(tmp_path)
    assert torch.equal(load(tmp_path, onto)(x), made.eval()(x))


@pytest.mark.parametrize("autocast", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_dtypes_are_pefts(autocast: bool, dtype: torch.dtype, seed: int) -> None:
    onto = small(seed, dtype)
    made = peft.get_peft_model(copy.deepcopy(onto), config(use_dora=True), autocast_adapter_dtype=autocast)
    want = torch.float32 if autocast else dtype
    for layer in layers(made).values():
        names = ("goat_A", "goat_B", "goat_router", "goat_start_A", "goat_start_B")
        assert {getattr(layer, name)["default"].dtype for name in names} == {want}
        assert layer.goat_scale["default"].dtype == layer.goat_magnitude["default"].dtype == torch.float32
        assert torch.equal(layer.goat_A["default"], layer.goat_start_A["default"])
    y = made(batch(seed, dtype))
    assert y.dtype == dtype
    y.float().sum().backward()
    with torch.autocast("cpu", torch.bfloat16):
        y = made(batch(seed, dtype))
    assert y.dtype == torch.bfloat16


def test_injected_without_a_peft_model(seed: int) -> None:
    onto, x = small(seed), batch(seed)
    made = peft.inject_adapter_in_model(config(), copy.deepcopy(onto))
    move(made)
    state = peft.get_peft_model_state_dict(made)
    again = peft.inject_adapter_in_model(config(), copy.deepcopy(onto))
    peft.set_peft_model_state_dict(again, state)
    assert torch.equal(again(x), made(x))


def test_whole_model_on_a_device_map(seed: int, tmp_path: Path) -> None:
    """Dispatched by Hugging Face accelerate, before and after: hooks that only move inputs change
    nothing.
    """
    hf = pytest.importorskip("accelerate")
    made = goat_llama(seed)
    batch = tokens(seed, 2, 5)
    logits = made(batch).logits
    hf.dispatch_model(made, {"": "cpu"}, force_hooks=True)
    assert torch.equal(made(batch).logits, logits)
    made.save_pretrained(tmp_path)
    onto = hf.dispatch_model(base(seed), {"": "cpu"}, force_hooks=True)
    assert torch.equal(peft.PeftModel.from_pretrained(onto, tmp_path)(batch).logits, logits)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_gives_the_same_gradients(reentrant: bool, seed: int) -> None:
    made = goat_llama(seed)
    batch, grads = tokens(seed, 2, 5), []
    for checkpointing in (False, True):
        if checkpointing:
            made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
            made.enable_input_require_grads()
        made.zero_grad()
        made.train()(input_ids=batch, labels=batch, use_cache=False).loss.backward()
        grads.append({name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    assert all(torch.equal(grads[1][name], grad) for name, grad in grads[0].items())


def test_deep_copy_is_another_model(seed: int) -> None:
    made, x = model(small(seed)), batch(seed)
    again = copy.deepcopy(made)
    assert torch.equal(again(x), made(x))
    train(again, x)
    assert not torch.equal(again(x), made(x))
    assert layers(again)["base_model.model.first"].options["default"] is again.peft_config["default"]


def test_unload_gives_the_base_model(seed: int) -> None:
    onto, x = small(seed), batch(seed)
    plain = model(onto).unload()
    assert torch.equal(plain(x), onto(x))
    assert not layers(plain)


def test_merging_a_mixture_is_refused_with_the_reason(seed: int) -> None:
    onto, x = small(seed), batch(seed)
    made = model(onto)
    y = made.eval()(x)
    for merge in (made.merge_adapter, made.merge_and_unload):
        with pytest.raises(RuntimeError, match="'default' weighs its 4 experts anew for every token \\(top_k = 2\\)"):
            merge()
    assert torch.equal(made(x), y)
    check_equal(made.unload(), onto)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_one_expert_merges(dtype: torch.dtype, seed: int) -> None:
    onto, x = small(seed, dtype), batch(seed, dtype)
    made = model(onto, num_experts=1, top_k=1, init_cof=0.7)
    y = made.eval()(x)
    made.merge_adapter(safe_merge=True)
    merged = made(x)
    if dtype == torch.float64:
        assert relative_error(merged, y) <= 1e-13
    for name, layer in layers(made).items():  # W' is rounded once
        weight = onto.get_submodule(name.removeprefix("base_model.model.")).weight
        update = layer.mean_update("default").to(torch.promote_types(dtype, torch.float32))
        want = (weight + (update.t() if name.endswith("second") else update)).to(dtype)
        assert torch.equal(layer.base_layer.weight, want)
    with made.disable_adapter():
        assert torch.equal(made(x), onto(x))
    made.unmerge_adapter()
    assert torch.equal(made(x), y)
    plain = made.merge_and_unload()
    assert torch.equal(plain(x), merged)
    assert not layers(plain)
