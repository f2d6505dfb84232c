"""What the tests of export_lora share: exporting without side effects, loading by PEFT alone,
comparing.
"""

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor, nn

from delora_kernels.integrations.peft.export.export_lora import LoraExport, export_lora
from delora_kernels.integrations.peft.export.low_rank_terms import survey


def assert_close(ours: Tensor, theirs: Tensor, dtype: torch.dtype | None = None) -> None:
    # both sides round differently in a chain of a few layers, each with a few roundings of size eps
    error = (ours.double() - theirs.double()).abs().max() / theirs.double().abs().max()
    assert error <= 64 * torch.finfo(dtype or theirs.dtype).eps, error


def weights(path: Path) -> dict[str, Tensor]:
    return load_file(path / "adapter_model.safetensors")


def settings(path: Path) -> dict[str, Any]:
    values: dict[str, Any] = json.loads((path / "adapter_config.json").read_text())
    return values


def state(model: nn.Module) -> dict[str, Any]:
    """All that an export could change: tensors, what trains, classes, modes, configs."""
    kept: dict[str, Any] = {f"tensor {k}": v.clone() for k, v in model.state_dict(keep_vars=False).items()}
    kept |= {f"trains {k}": (p.requires_grad, p.grad, p._version) for k, p in model.named_parameters()}
    kept |= {f"kind {k}": (type(m), m.training, sorted(m.__dict__)) for k, m in model.named_modules()}
    return kept | {f"config {name}": repr(value) for name, value in survey(model).configs}


def export(model: nn.Module, path: Path, **options: Any) -> LoraExport:
    """export_lora, checked to leave the model alone."""
    before = state(model)
    result = export_lora(model, path, **options)
    after = state(model)
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name
    return result


def load(base: nn.Module, path: Any) -> Any:
    """The folder on `base`, by PEFT alone; a key or a pattern without its layer is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", RuntimeWarning)
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        made = peft.PeftModel.from_pretrained(copy.deepcopy(base), path)
    return made.eval()


def check(model: nn.Module, base: nn.Module, path: Path, *inputs: Tensor, **options: Any) -> Any:
    """Export, load on the base, compare outputs, also merged; returns the loaded model."""
    result = export(model, path, **options)
    loaded = load(base, path)
    with torch.no_grad():
        expected, unadapted = model.eval()(*inputs), base.eval()(*inputs)
        got = loaded(*inputs)
        merged = loaded.merge_and_unload()(*inputs)
    values = [getattr(y, "logits", y) for y in (got, merged, expected, unadapted)]
    assert_close(values[0], values[2])
    assert_close(values[1], values[2])
    assert (values[2] - values[3]).abs().max() > 0.01 * values[2].abs().max()  # there was something to export
    check_standard(path, result)
    return load(base, path)


def check_standard(path: Path, result: LoraExport) -> None:
    """What every loader of LoRA relies on: names, shapes, plain LoRA, scale 1, also without
    patterns.
    """
    tensors, values = weights(path), settings(path)
    factors = {k: v for k, v in tensors.items() if ".lora_" in k}
    names = {f"base_model.model.{name}.lora_{role}.weight" for name in result.ranks for role in "AB"}
    assert factors.keys() == names
    for name, rank in result.ranks.items():
        assert factors[f"base_model.model.{name}.lora_A.weight"].shape[0] == rank
        assert factors[f"base_model.model.{name}.lora_B.weight"].shape[1] == rank
    assert values["peft_type"] == "LORA"
    assert values["r"] == values["lora_alpha"] == max(result.ranks.values())
    assert values["alpha_pattern"] == values["rank_pattern"]
    assert not values["use_dora"]
    assert not values["use_rslora"]
    assert not values.get("lora_bias")
    assert values["inference_mode"] is True
    assert result.bytes == (path / "adapter_model.safetensors").stat().st_size
    assert {file.name for file in path.iterdir()} == {"adapter_config.json", "adapter_model.safetensors", "README.md"}


def llama(**options: Any) -> Any:
    sizes: Any = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(vocab_size=64, num_key_value_heads=1, pad_token_id=0, **sizes, **options)
    ).eval()
