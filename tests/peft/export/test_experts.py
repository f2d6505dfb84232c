"""export_lora of adapters on experts: PEFT loads the one layout, the model's own checkpoint names
spell the other, and every expert's ΔW is the model's.
"""

import copy
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from expert_models import randomise
from exports import assert_close, export, load, settings, weights
from peft.tuners.lora.layer import ParamWrapper
from safetensors.torch import load_file
from torch import Tensor

import delora_kernels as dk
from delora_kernels.integrations.peft.export import expert_check, export_lora

torch.set_num_threads(1)
pytestmark = pytest.mark.skipif(
    transformers.__version__ < "5", reason="Transformers 4 keeps experts as modules, which PEFT adapts as linears"
)

E = 4
SIZES: dict[str, Any] = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 32}
SIZES |= {"num_key_value_heads": 1, "head_dim": 8, "num_experts_per_tok": 2, "pad_token_id": 0}
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_moe": ("Qwen3Moe", {"moe_intermediate_size": 8, "intermediate_size": 24, "num_experts": E}),
    "mixtral": ("Mixtral", {"intermediate_size": 8, "num_local_experts": E}),
    "gpt_oss": ("GptOss", {"intermediate_size": 8, "num_local_experts": E}),
}


PATTERNS: dict[str, Any] = {"moe_intermediate_size": 8, "n_routed_experts": E, "q_lora_rank": 8, "o_lora_rank": 8}
PATTERNS |= {"o_groups": 2, "index_n_heads": 2, "index_head_dim": 8, "hc_mult": 2, "partial_rotary_factor": 0.5}
PATTERNS |= {"layer_types": ["heavily_compressed_attention"] * 2, "mlp_layer_types": ["moe"] * 2}


def model_of(kind: str, seed: int) -> Any:
    name, options = KINDS.get(kind, ("DeepseekV4", PATTERNS))
    if not hasattr(transformers, f"{name}Config"):
        pytest.skip(f"this Transformers has no {name}")
    torch.manual_seed(seed)
    config = getattr(transformers, f"{name}Config")(**SIZES | options)
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


def adapted(base: Any, seed: int, targets: tuple[str, ...] = ("gate_up_proj", "down_proj"), **options: Any) -> Any:
    """LoRA on the experts and on one linear of the attention."""
    parameters = [f"mlp.experts.{name}" for name in targets]
    config = peft.LoraConfig(
        r=3, lora_alpha=5, target_modules=["q_proj"], target_parameters=parameters, task_type="CAUSAL_LM", **options
    )
    made = peft.get_peft_model(copy.deepcopy(base), config)
    randomise(made, seed)
    return made


def logits(model: Any) -> Tensor:
    with torch.no_grad():
        found: Tensor = model.eval()(torch.arange(10)[None]).logits
    return found


@pytest.mark.parametrize("fused", [False, True], ids=["eager", "accelerated"])
@pytest.mark.parametrize("kind", KINDS)
def test_fused_layout_is_loaded_by_peft(kind: str, fused: bool, seed: int, tmp_path: Path) -> None:
    base = model_of(kind, seed)
    made = adapted(base, seed)
    if fused:
        dk.accelerate(made)
    result = export(made, tmp_path)
    loaded = load(base, tmp_path)
    assert_close(logits(loaded), logits(made))
    assert (logits(loaded) - logits(base)).abs().max() > 0.01 * logits(base).abs().max()
    own = made.state_dict()
    scale = 5 / 3
    for key, tensor in weights(tmp_path).items():  # PEFT's own keys and packing, the scale inside B
        theirs = own[key.replace(".weight", ".default.weight")]
        torch.testing.assert_close(tensor, theirs * scale if "lora_B" in key else theirs, rtol=1e-6, atol=0)
    assert result.ranks.keys() == {
        *(f"model.layers.{n}.mlp.experts.{name}" for n in range(2) for name in ("gate_up_proj", "down_proj")),
        *(f"model.layers.{n}.self_attn.q_proj" for n in range(2)),
    }
    # what vLLM's 3-D models look up: gate_up as base_layer, down as the experts module itself
    assert "base_model.model.model.layers.0.mlp.experts.base_layer.lora_A.weight" in weights(tmp_path)
    assert settings(tmp_path)["r"] == settings(tmp_path)["lora_alpha"] == 3


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_per_expert_layout_is_that_of_the_checkpoint(kind: str, seed: int, tmp_path: Path) -> None:
    """Added to the checkpoint that Transformers writes of the base, key by key, it gives the
    checkpoint of the merged model.
    """
    base = model_of(kind, seed)
    made = adapted(base, seed)
    export(made, tmp_path / "adapter", experts="per_expert")
    base.save_pretrained(tmp_path / "base")
    made.merge_and_unload().save_pretrained(tmp_path / "merged")
    held = load_file(tmp_path / "base" / "model.safetensors")
    merged = load_file(tmp_path / "merged" / "model.safetensors")
    tensors = weights(tmp_path / "adapter")
    assert len(tensors) == 2 * (2 * (3 * E) + 2)
    for key in [key for key in tensors if "lora_A" in key]:
        delta = tensors[key.replace("lora_A", "lora_B")] @ tensors[key]
        held[key.removeprefix("base_model.model.").replace(".lora_A", "")] += delta
    assert held.keys() == merged.keys()
    assert sum(".experts." in key for key in held) == 2 * 3 * E
    for key, value in merged.items():
        torch.testing.assert_close(held[key], value, rtol=1e-5, atol=1e-6, msg=key)
    names = {"qwen3_moe": {"gate_proj", "up_proj", "down_proj"}, "mixtral": {"w1", "w2", "w3"}}[kind]
    assert {each.rpartition(".")[2] for each in settings(tmp_path / "adapter")["target_modules"]} == names | {"q_proj"}


def test_names_of_checkpoints_that_are_patterns(seed: int, tmp_path: Path) -> None:
    """Transformers writes DeepSeek-V4's renamings as regular expressions."""
    base = model_of("deepseek_v4", seed)
    parameters = [f"mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    made: Any = peft.get_peft_model(base, peft.LoraConfig(r=2, target_modules=[], target_parameters=parameters))
    randomise(made, seed)
    export(made, tmp_path / "adapter", experts="per_expert")
    made.unload().save_pretrained(tmp_path / "base")
    held = load_file(tmp_path / "base" / "model.safetensors")
    named = {re.sub(r"^base_model\.model\.|\.lora_[AB]", "", key) for key in weights(tmp_path / "adapter")}
    assert named == {key for key in held if re.search(r"\.experts\.\d", key)}
    assert len(named) == 2 * 3 * E


def test_several_adapters_one_projection_and_ranks(seed: int, tmp_path: Path) -> None:
    """Two stacked adapters of different ranks on down_proj alone; half precision."""
    base = model_of("qwen3_moe", seed)
    made = adapted(base, seed, ("down_proj",))
    pattern: Any = {"rank_pattern": {"down_proj": 2}, "alpha_pattern": {"down_proj": 7}}
    config = peft.LoraConfig(r=4, target_modules=[], target_parameters=["mlp.experts.down_proj"], **pattern)
    made.add_adapter("other", config)
    made.base_model.set_adapter(["default", "other"])
    randomise(made, seed + 1)
    result = export(made, tmp_path / "whole")
    assert result.ranks["model.layers.0.mlp.experts.down_proj"] == 5
    assert_close(logits(load(base, tmp_path / "whole")), logits(made))
    export(made, tmp_path / "half", dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in weights(tmp_path / "half").values()} == {torch.bfloat16}
    export(made, tmp_path / "one", adapter="other", experts="per_expert")
    found = weights(tmp_path / "one")
    assert found["base_model.model.model.layers.1.mlp.experts.2.down_proj.lora_B.weight"].shape == (16, 2)


@pytest.mark.parametrize("layout", ["fused", "per_expert"])
def test_a_file_with_another_update_is_not_handed_out(
    layout: str, seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts in another order, and gate and up the other way round."""
    made = adapted(model_of("qwen3_moe", seed), seed)
    dk.export_lora(made, tmp_path, adapter="default", dtype=torch.bfloat16)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    for name in ("fused_tensors", "per_expert_tensors"):
        own = getattr(export_lora, name)
        wrong = lambda key, pair, *rest, own=own: own(key, pair._replace(B=pair.B.roll(1, 0)), *rest)  # noqa: E731
        monkeypatch.setattr(export_lora, name, wrong)
    with pytest.raises(RuntimeError, match=r"would hold another update of model.layers.0.mlp.experts.\w+, expert 0"):
        dk.export_lora(made, tmp_path, experts=layout)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before
    assert expert_check.ROUNDING < 100


def test_adapters_that_cancel(seed: int, tmp_path: Path) -> None:
    """Their sum is rounding alone, which is no other update."""
    made = adapted(model_of("qwen3_moe", seed), seed, ("down_proj",))
    made.add_adapter("other", peft.LoraConfig(r=3, target_modules=[], target_parameters=["mlp.experts.down_proj"]))
    made.base_model.set_adapter(["default", "other"])
    with torch.no_grad():
        for module in made.modules():
            if isinstance(module, ParamWrapper):
                ratio = module.scaling["default"] / module.scaling["other"]
                module.lora_A["other"].weight.copy_(module.lora_A["default"].weight)
                module.lora_B["other"].weight.copy_(-ratio * module.lora_B["default"].weight)
    export(made, tmp_path)
    made.base_model.set_adapter("default")
    export(made, tmp_path / "one")
    both, one = (weights(folder) for folder in (tmp_path, tmp_path / "one"))
    B = next(key for key in one if "lora_B" in key)
    A = B.replace("lora_B", "lora_A")
    assert both[A].shape[0] == 2 * one[A].shape[0]
    assert float(one[A].abs().max()) > 0


def test_refused(seed: int, tmp_path: Path) -> None:
    made = adapted(model_of("gpt_oss", seed), seed)
    with pytest.raises(ValueError, match="experts must be 'fused' for this model, got 'per_expert' for model.layers.0"):
        dk.export_lora(made, tmp_path / "new", experts="per_expert")
    with pytest.raises(ValueError, match=re.escape("experts must be one of ('fused', 'per_expert'), got 'both'")):
        dk.export_lora(made, tmp_path / "new", experts="both")
    made.merge_adapter()
    with pytest.raises(ValueError, match="call unmerge_adapter"):
        dk.export_lora(made, tmp_path / "new")
    assert not (tmp_path / "new").exists()
