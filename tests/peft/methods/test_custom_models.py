"""What PEFT's custom-model suite asks of its methods, asked of GOAT, ETHER and ETHER+ (all of it:
tests/peft_suite).
"""

import copy
import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from forked import context
from goat_models import small
from golden_cases import relative_error
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel

import delora_kernels as dk

ONE_EXPERT: dict[str, Any] = {"r": 2, "num_experts": 1, "top_k": 1, "init_weights": False}
METHODS: dict[str, tuple[Any, dict[str, Any]]] = {
    "goat": (dk.GoatConfig, {"r": 2, "num_experts": 4, "init_weights": False}),
    "one expert": (dk.GoatConfig, ONE_EXPERT),
    "ether": (dk.EtherConfig, {"n_blocks": 2}),
    "ether+": (dk.EtherPlusConfig, {"init_weights": False}),
}
every_method = pytest.mark.parametrize("method", METHODS)
merging = pytest.mark.parametrize("method", [name for name in METHODS if name != "goat"])


def config(method: str, *targets: str, **others: Any) -> Any:
    kind, options = METHODS[method]
    return kind(target_modules=list(targets or ("first", "third")), **options, **others)


def batch(seed: int) -> Tensor:
    return torch.randn(6, 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained(made: nn.Module) -> set[str]:
    return {name for name, p in made.named_parameters() if p.requires_grad}


def own(made: Any, adapter: str, *layers: str) -> set[str]:
    """The parameters of an adapter in layers of these names, or in all."""
    names = [name for name, _ in made.named_parameters() if name.endswith(f".{adapter}") and made.prefix in name]
    return {name for name in names if not layers or any(f".{layer}." in name for layer in layers)}


def test_a_saved_folder_says_what_it_needs(tmp_path: Path) -> None:
    """PEFT without this library raises KeyError; who then looks into the folder finds the remedy,
    the same for every method.
    """
    remedies = set()
    for method in METHODS:
        peft.get_peft_model(small(0), config(method)).save_pretrained(tmp_path / method)
        saved = json.loads((tmp_path / method / "adapter_config.json").read_text(encoding="utf-8"))
        assert saved["needs"].startswith("pip install delora-kernels; before loading: ")
        remedies.add(saved["needs"])
    (needs,) = remedies
    said = tmp_path / "said"
    code = f"""
import pathlib
import peft
def found(): return [peft.PeftConfig.from_pretrained(f"{tmp_path}/{{name}}").needs for name in {list(METHODS)}]
try: found()
except KeyError: before = "refused"
{needs.partition("before loading: ")[2]}
pathlib.Path({str(said)!r}).write_text("\\n".join([before, *found()]), encoding="utf-8")
"""
    process = context().Process(target=exec, args=(code, {}))  # which has not imported this file
    process.start()
    process.join(300)
    process.kill()
    process.join()
    assert process.exitcode == 0
    assert said.read_text(encoding="utf-8").splitlines() == ["refused"] + [needs] * len(METHODS)


@every_method
def test_pickled_under_a_name_that_others_contain(method: str, seed: int, tmp_path: Path) -> None:
    onto, x = small(seed), batch(seed)
    made = peft.get_peft_model(copy.deepcopy(onto), config(method), adapter_name="one")
    for name in ("one_more", "not_one"):
        made.add_adapter(name, config(method))
    outputs = {}
    for name in ("one", "one_more", "not_one"):
        made.set_adapter(name)
        outputs[name] = made.eval()(x)
    made.save_pretrained(tmp_path, safe_serialization=False)
    for name, want in outputs.items():
        again = peft.PeftModel.from_pretrained(copy.deepcopy(onto), tmp_path / name)
        assert torch.equal(again(x), want)
        assert {key.replace("default", name) for key in own(again, "default")} == own(made, name)


@every_method
def test_state_of_a_model_that_fsdp_wraps_is_loaded_by_a_plain_one(method: str, seed: int, process_group: None) -> None:
    onto, x = small(seed), batch(seed)
    made = peft.get_peft_model(copy.deepcopy(onto), config(method)).eval()
    want = made(x)
    wrapped: Any = FullyShardedDataParallel(made, use_orig_params=True, device_id=torch.device("cpu"))
    assert relative_error(wrapped(x), want) <= 1e-14
    state = {key: value.clone() for key, value in peft.get_peft_model_state_dict(wrapped).items()}
    again = peft.get_peft_model(copy.deepcopy(onto), config(method)).eval()
    assert not torch.equal(again(x), want)
    peft.set_peft_model_state_dict(again, state)
    assert torch.equal(again(x), want)


@every_method
@pytest.mark.parametrize("trainable", [False, True])
def test_what_trains_after_loading(method: str, trainable: bool, seed: int, tmp_path: Path) -> None:
    """The same adapters of the same layers as with LoRA, in the PEFT that is here (versions differ
    for the second).
    """

    def loaded(of: Any, folder: Path) -> tuple[set[tuple[str, str]], ...]:
        onto = small(seed)
        peft.get_peft_model(copy.deepcopy(onto), of).save_pretrained(folder)
        made = peft.PeftModel.from_pretrained(copy.deepcopy(onto), folder, is_trainable=trainable)
        first = places(made)
        made.load_adapter(folder, "other", is_trainable=trainable)
        return first, places(made)

    def places(made: nn.Module) -> set[tuple[str, str]]:
        words = [name.split(".") for name in trained(made)]
        return {(word[2], "default" if "default" in word else "other") for word in words}

    options: dict[str, Any] = {"target_modules": ["first", "third"], "modules_to_save": ["second"]}
    ours = loaded(config(method, modules_to_save=["second"]), tmp_path / "ours")
    theirs = loaded(peft.LoraConfig(**options), tmp_path / "theirs")
    assert ours == theirs
    assert ours[0] == ({(layer, "default") for layer in ("first", "second", "third")} if trainable else set())


@every_method
def test_adapters_on_different_layers_are_chosen(method: str, seed: int) -> None:
    """A layer that the chosen adapter does not have is the base's, and nothing of the other
    trains.
    """
    onto, x = small(seed), batch(seed)
    made = peft.get_peft_model(copy.deepcopy(onto), config(method, "first", "second"))
    made.add_adapter("other", config(method, "second", "third"))
    both = {name: made.get_submodule(f"base_model.model.{name}") for name in ("first", "second", "third")}
    made.set_adapter("other")
    assert trained(made) == own(made, "other")
    assert own(made, "other") == own(made, "other", "second", "third") != own(made, "other", "second")
    narrow = batch(seed)
    assert torch.equal(both["first"].eval()(narrow), both["first"].get_base_layer()(narrow))
    made.base_model.set_adapter(["default", "other"])
    assert trained(made) == own(made, "default") | own(made, "other")
    two = made.eval()(x)
    made.set_adapter("default")
    assert not torch.equal(made(x), two)
    with made.disable_adapter():
        assert torch.equal(made(x), onto(x))


@every_method
def test_layers_in_different_states_are_warned_of(method: str, seed: int) -> None:
    made = peft.get_peft_model(small(seed), config(method))
    layers = [layer for layer in made.modules() if isinstance(layer, BaseTunerLayer)]
    assert all(layer.in_features > 0 and layer.out_features > 0 for layer in layers)
    layers[0].enable_adapters(False)
    words = "some adapter layers that are enabled and others that are disabled"
    with pytest.warns(UserWarning, match=words), made.disable_adapter():
        assert all(layer.disable_adapters for layer in layers)
    assert not any(layer.disable_adapters for layer in layers)


@merging
def test_several_merge_at_once_or_one_after_the_other(method: str, seed: int) -> None:
    """Merged, the model is what it was; again changes nothing; disabled or unmerged it is the base,
    bit for bit.
    """
    onto, x = small(seed).eval(), batch(seed)
    made = peft.get_peft_model(copy.deepcopy(onto), config(method), adapter_name="a")
    made.add_adapter("b", config(method))
    made.base_model.set_adapter(["a", "b"])
    want = made.eval()(x)
    made.merge_adapter(["a", "b"])
    assert relative_error(made(x), want) <= 1e-12
    with pytest.warns(UserWarning, match="[Aa]lready"):
        made.merge_adapter(["a", "b"])
    assert relative_error(made(x), want) <= 1e-12
    made.unmerge_adapter()
    for name in ("a", "b"):
        made.merge_adapter([name])
    assert relative_error(made(x), want) <= 1e-12
    with made.disable_adapter():
        assert torch.equal(made(x), onto(x))
    single = copy.deepcopy(made)
    single.unmerge_adapter()
    single.set_adapter("b")
    alone = single(x)
    assert relative_error(single.merge_and_unload(adapter_names=["b"])(x), alone) <= 1e-12


def test_tensors_without_a_start_are_refused_by_an_adapter_with_one(seed: int) -> None:
    """A state dict of another config, or one without its buffers: what was subtracted in training
    can't be told.
    """
    options: dict[str, Any] = {"r": 1, "num_experts": 2, "target_modules": ["first"]}
    started = peft.get_peft_model(small(seed), dk.GoatConfig(**options))
    plain = peft.get_peft_model(small(seed), dk.GoatConfig(**options, init_weights=False))
    with pytest.raises(RuntimeError, match="subtracts its start, and the state dict that it should load has none"):
        peft.set_peft_model_state_dict(started, peft.get_peft_model_state_dict(plain))
    parameters = {name: p for name, p in started.named_parameters() if p.requires_grad}
    with pytest.raises(RuntimeError, match="subtracts its start"):
        started.load_state_dict(parameters, strict=False)
    for state in (started.state_dict(), {}, {k: v for k, v in started.state_dict().items() if "goat" not in k}):
        started.load_state_dict(state, strict=False)
    probed = peft.get_peft_model(small(seed), dk.GoatConfig(**options, save_start=False))
    probed.load_state_dict(probed.state_dict())
