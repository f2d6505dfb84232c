"""What export_lora refuses: the layer, the reason and the remedy are named, and nothing is
written.
"""

import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exports import llama
from peft_models import Small, config
from torch import nn

from delora_kernels.integrations.peft.export.export_lora import export_lora
from delora_kernels.nn import DeLoRALinear, DoRALinear, EtherLinear, GroupedLoRALinear, LoRALinear, MoELoRALinear

torch.set_num_threads(1)

ALL = ["first", "second", "third"]


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> None:
    torch.manual_seed(seed)


def small(method: str, **options: Any) -> Any:
    return peft.get_peft_model(Small(conv1d=method == "lora"), config(method, **{"target_modules": ALL} | options))


def first(made: Any) -> Any:
    return made.base_model.model.first


def change(method: str, how: Any, **options: Any) -> Any:
    made = small(method, **options)
    how(made)
    return made


def set_factor(name: str, value: Any, method: str = "delora") -> Any:
    return change(method, lambda made: getattr(first(made), name).update({"default": value}))


def of(cls: Any, base: nn.Module, **options: Any) -> Any:
    return peft.get_peft_model(base, cls(target_modules=["0"], **options))


def tables() -> nn.Sequential:
    return nn.Sequential(nn.Embedding(9, 4), nn.Linear(4, 4))


def shared() -> nn.Module:
    layer = DeLoRALinear(4, 4)
    return nn.Sequential(layer, layer)


def merged_own() -> nn.Module:
    layer = DeLoRALinear(4, 4)
    layer.merge()
    return nn.Sequential(layer)


def unknown_bias() -> nn.Module:
    made = peft.inject_adapter_in_model(config("delora", target_modules=ALL, bias="all"), Small(conv1d=False))
    del made.peft_config
    return made


class Subclass(LoRALinear):
    pass


class Sharded(nn.Parameter):
    pass


def prompts() -> Any:
    return peft.get_peft_model(llama(), peft.PromptTuningConfig(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def tokens() -> Any:
    options: Any = {"target_modules": ["q_proj"], "trainable_token_indices": [1, 2]}
    return peft.get_peft_model(llama(), peft.LoraConfig(**options))


def saved_adapter() -> Any:
    base = nn.Sequential(nn.Linear(4, 4), nn.Sequential(DeLoRALinear(4, 4)))
    return peft.get_peft_model(base, peft.DeloraConfig(target_modules=["0"], modules_to_save=["1"]))


def meta_head() -> Any:
    made = small("delora", target_modules=["first"], modules_to_save=["third"])
    made.base_model.model.third.modules_to_save["default"].to("meta")
    return made


REFUSED: dict[str, tuple[Any, str]] = {
    "DoRA": (lambda: small("dora"), "layer 'first' must be a low-rank term.*DoRA, which rescales.*merge_and_unload"),
    "own DoRA": (lambda: nn.Sequential(DoRALinear(4, 4)), "layer '0'.*DoRA, which rescales the rows of W.*merge"),
    "own subclass": (lambda: nn.Sequential(Subclass(4, 4)), "layer '0'.*a Subclass, which is not listed in"),
    "own mixture": (lambda: nn.Sequential(MoELoRALinear(4, 4, 1, 2)), "layer '0'.*a mixture, whose update is another"),
    "own grouped": (
        lambda: nn.Sequential(LoRALinear(4, 4), GroupedLoRALinear(4, 4, 2)),
        "layer '1'.*a GroupedLoRALinear, whose update no LoRA adapter.*merge",
    ),
    "own ETHER": (
        lambda: nn.Sequential(LoRALinear(4, 4), EtherLinear(4, 4)),
        "layer '1'.*a EtherLinear, whose update no LoRA adapter.*merge",
    ),
    "own merged": (merged_own, "layer '0'.*unmerge"),
    "lora_bias": (lambda: small("lora", lora_bias=True), "layer 'first'.*lora_bias=True"),
    "LoHa": (lambda: of(peft.LoHaConfig, nn.Sequential(nn.Linear(4, 4))), "layer '0'.*loha.layer.Linear layer"),
    "IA3": (
        lambda: of(peft.IA3Config, nn.Sequential(nn.Linear(4, 4)), feedforward_modules=[]),
        "layer '0'.*ia3.layer.Linear layer",
    ),
    "embedding": (lambda: of(peft.LoraConfig, tables()), "layer '0'.*lora.layer.Embedding layer"),
    "convolution": (
        lambda: of(peft.LoraConfig, nn.Sequential(nn.Conv2d(2, 3, 1))),
        "layer '0'.*lora.layer.Conv2d layer",
    ),
    "variant": (
        lambda: change("lora", lambda m: first(m).lora_variant.update(default=object())),
        "layer 'first'.*the LoRA variant object",
    ),
    "merged": (lambda: change("delora", lambda m: m.merge_adapter()), "layer 'first'.*merged.*unmerge_adapter"),
    "disabled": (
        lambda: change("delora", lambda m: m.base_model.disable_adapter_layers()),
        "layer 'first'.*disabled.*enable",
    ),
    "base start": (
        lambda: change("lora", lambda m: setattr(m.peft_config["default"], "init_lora_weights", "pissa_niter_4")),
        "adapter 'default'.*changed the base weight.*pissa",
    ),
    "replication": (
        lambda: change("lora", lambda m: setattr(m.peft_config["default"], "layer_replication", [(0, 2)])),
        "adapter 'default'.*layer_replication",
    ),
    "prompt tuning": (prompts, "adapter 'default' must be a low-rank term, got one of method PROMPT_TUNING"),
    "trainable tokens": (tokens, "layer 'model.embed_tokens'.*TrainableTokensWrapper"),
    "adapter in a saved module": (saved_adapter, "layer '1'.*trained beside the adapters that holds adapters itself"),
    "no adapters": (lambda: nn.Linear(3, 4), "model must be one with DeLoRA or LoRA layers, got a Linear without any"),
    "none active": (
        lambda: change("lora", lambda m: m.base_model.set_adapter([])),
        "model must be one with DeLoRA or LoRA layers",
    ),
    "a layer": (lambda: first(small("delora")), "layer '' .*pass the model that holds the layer"),
    "shared module": (shared, "layer '1'.*under a second name"),
    "meta": (
        lambda: set_factor("delora_A", nn.Parameter(torch.empty(3, 12, device="meta"))),
        "layer 'first'.*the A is on the meta device; load",
    ),
    "empty": (
        lambda: set_factor("delora_B", nn.Parameter(torch.empty(0))),
        "layer 'first'.*the B is empty .sharded.*gather",
    ),
    "flat": (lambda: set_factor("delora_B", nn.Parameter(torch.randn(60))), "layer 'first'"),
    "subclass": (
        lambda: set_factor("delora_A", Sharded(torch.randn(3, 12))),
        "layer 'first'.*the A is a Sharded; gather it first",
    ),
    "wrong rank": (lambda: change("delora", lambda m: first(m).r.update(default=7)), "layer 'first'.*rank 7"),
    "factor owner": (lambda: set_factor("lora_A", nn.Sequential(), "lora"), "layer 'first'.*lora_A that is a Seq"),
    "NaN": (lambda: set_factor("delora_A", nn.Parameter(torch.full((3, 12), torch.nan))), "layer 'first'.*NaN or Inf"),
    "unknown bias": (unknown_bias, "layer 'first'.*a bias that trains, and no PEFT config"),
    "meta module to save": (meta_head, "'third.weight' must be a whole local tensor, got a meta tensor"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused(name: str, tmp_path: Path) -> None:
    """With the layer, the reason and the remedy; nothing is written and nothing changed."""
    make, message = REFUSED[name]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = make()
    with pytest.raises(ValueError, match=message) as caught:
        export_lora(made, tmp_path / "out")
    assert str(caught.value).startswith("export_lora: ")
    assert not (tmp_path / "out").exists()


def test_half_precision_overflow(tmp_path: Path) -> None:
    made = small("delora")
    first(made).delora_w_norm["default"] *= 1e6
    with pytest.raises(
        ValueError, match="layer 'first' must be within the range of torch.float16.*in its A'; pass dty"
    ):
        export_lora(made, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()
    export_lora(made, tmp_path / "out", dtype=torch.bfloat16)


def test_wrong_arguments(tmp_path: Path) -> None:
    made: Any = small("delora")
    wrong: list[tuple[Any, Any, str]] = [
        (("gpt2", tmp_path), {}, "model must be a torch.nn.Module, got str"),
        ((made, None), {}, "directory must be a path, got NoneType"),
        ((made, tmp_path), {"adapter": ["default"]}, "adapter must be a name or None, got list"),
        ((made, tmp_path), {"dtype": torch.int8}, "dtype must be None or one of .*, got torch.int8"),
    ]
    for arguments, options, message in wrong:
        with pytest.raises(TypeError, match=message):
            export_lora(*arguments, **options)
    with pytest.raises(ValueError, match=r"adapter must be None or one of \['default'\], got 'other'"):
        export_lora(made, tmp_path / "out", adapter="other")
    own_only = nn.Sequential(DeLoRALinear(4, 4))
    with pytest.raises(ValueError, match=r"adapter must be None or one of \[\], got 'default'"):
        export_lora(own_only, tmp_path / "out", adapter="default")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["{", "[]", '{"peft_type": "DELORA"}'])
def test_folders_that_are_not_free(text: str, tmp_path: Path) -> None:
    """Whatever is no LoRA adapter is left alone."""
    made: Any = small("delora")
    config_file = tmp_path / "adapter_config.json"
    config_file.write_text(text)
    with pytest.raises(ValueError, match="directory must be free or a LoRA adapter's"):
        export_lora(made, tmp_path)
    assert [file.name for file in tmp_path.iterdir()] == [config_file.name]
    assert config_file.read_text() == text


def test_paths_that_are_no_folders(tmp_path: Path) -> None:
    made: Any = small("delora")
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file", tmp_path / "file" / "folder"):
        with pytest.raises(ValueError, match="directory must be a folder or new, got a file"):
            export_lora(made, path)
    with pytest.raises(ValueError, match="directory must be a path, got an empty one"):
        export_lora(made, "")
