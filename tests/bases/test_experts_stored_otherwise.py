"""Experts that come quantised: torchao's tensors are dequantised by groups, also where PEFT can't
train them; checkpoints in MXFP4 are made dense, or put into 4-bit blocks, while they are loaded;
what is not read is named, with what to do.
"""

import json
import re
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from expert_models import Block, E, H, adapted, assert_close, block, routed, step, up_name
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.bases import stored_experts
from delora_kernels.bases.stored_experts import StoredExperts

transformers: Any = pytest.importorskip("transformers", "5")

torch.set_num_threads(1)


@pytest.fixture
def torchao() -> Any:
    return pytest.importorskip("torchao.quantization", reason="needs torchao: pip install 'delora-kernels[torchao]'")


def stored_by(torchao: Any, kind: str, weight: Tensor, **options: Any) -> Any:
    """A weight in one of torchao's forms."""
    if kind == "int8":
        return torchao.Int8Tensor.from_hp(weight, granularity=torchao.PerRow(), **options)
    return torchao.Float8Tensor.from_hp(weight, granularity=torchao.PerRow(), **options)


def with_torchao(torchao: Any, kind: str, family: str, seed: int, **options: Any) -> tuple[Block, Block]:
    """Return a block with its weights in one of torchao's forms, and one with what these are."""
    made, dense = (block(family, "grouped_mm", seed=seed) for _ in range(2))
    for name in (up_name(made), "down_proj"):
        packed = stored_by(torchao, kind, made.experts._parameters[name].detach(), **options)  # type: ignore[union-attr]
        made.experts._parameters[name] = nn.Parameter(packed, requires_grad=False)
        dense.experts._parameters[name] = nn.Parameter(packed.dequantize(), requires_grad=False)
    return made, dense


@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_torchao(family: str, kind: str, torchao: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and every gradient as PEFT's on the dense weights, one expert dense at a time; PEFT's
    own forward has no addition onto such a weight.
    """
    stored, dense = (adapted(each, seed=seed + 1) for each in with_torchao(torchao, kind, family, seed))
    inputs = routed(9, seed)
    with pytest.raises(NotImplementedError, match="unimplemented operator"):
        step(stored, inputs)
    dk.accelerate(stored, strict=True)
    seen: list[int] = []
    own = StoredExperts.dense

    def watched(self: StoredExperts, first: int, last: int, dtype: torch.dtype) -> Tensor:
        seen.append(last - first)
        self.workspace_mib = 1e-9
        return own(self, first, last, dtype)

    monkeypatch.setattr(StoredExperts, "dense", watched)
    assert_close(step(stored, inputs), step(dense, inputs))
    hit = len(set(inputs[1].flatten().tolist()))
    assert sum(seen) == 2 * 2 * hit
    assert dk.training_report(stored).alarms == ()


def test_torchao_that_does_more_is_left(torchao: Any, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Activations quantised too; a weight that trains; a slice that is another weight."""
    from torchao.quantization.quantize_.workflows.int8.int8_tensor import QuantizeTensorToInt8Kwargs

    def reason(made: Block) -> str:
        return str(dk.accelerate(adapted(made)))

    quantised = QuantizeTensorToInt8Kwargs(granularity=torchao.PerRow())
    made, _ = with_torchao(torchao, "int8", "qwen3_moe", seed, act_quant_kwargs=quantised)
    assert "its gate_up_proj is torchao's Int8Tensor, which quantises its input too" in reason(made)
    made, _ = with_torchao(torchao, "int8", "qwen3_moe", seed)
    model = adapted(made)
    model.base_model.model.experts.get_base_layer().down_proj.requires_grad_()
    assert "its down_proj is stored in few bits, and is to train" in str(dk.accelerate(model))
    made, _ = with_torchao(torchao, "int8", "qwen3_moe", seed)
    monkeypatch.setattr(stored_experts, "_found", {})
    other = lambda self: torch.full(self.shape, float(self.dim()))  # noqa: E731
    monkeypatch.setattr(torchao.Int8Tensor, "dequantize", other)
    assert "which reads otherwise expert by expert than in a slice" in reason(made)


def mxfp4(folder: Path, seed: int) -> Any:
    """Save a gpt-oss model whose experts are random numbers in MXFP4, and return what loads it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "vocab_size": 32, "intermediate_size": 64, "num_local_experts": 4}
    transformers.GptOssForCausalLM(transformers.GptOssConfig(**sizes, num_experts_per_tok=2)).save_pretrained(folder)
    tensors = {}
    for name, value in load_file(folder / "model.safetensors").items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, K, N = value.shape
            tensors[f"{name}_blocks"] = torch.randint(0, 256, (experts, N, K // 32, 16), dtype=torch.uint8)
            tensors[f"{name}_scales"] = torch.randint(118, 124, (experts, N, K // 32), dtype=torch.uint8)
        else:
            tensors[name] = value
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    left = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": left}
    (folder / "config.json").write_text(json.dumps(config))
    made = transformers.Mxfp4Config(dequantize=True)
    return partial(transformers.AutoModelForCausalLM.from_pretrained, folder, quantization_config=made)


def test_a_checkpoint_in_mxfp4_trains(seed: int, tmp_path: Path) -> None:
    """Dense, and in 4-bit blocks as soon as each layer's experts are read: the same blocks."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    load, targets = mxfp4(tmp_path, seed), ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    afterwards, (model, _) = load(), dk.load_with_quantized_experts(load)
    name, losses = "model.layers.1.mlp.experts.down_proj", []
    dense, packed = afterwards.get_parameter(name).detach().clone(), model.get_parameter(name) + 0
    assert float((packed - dense).norm() / dense.norm()) < 0.2  # 4 bits of 4 bits
    dk.quantize_experts(afterwards)
    for each in (load(), afterwards, model):
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=2, target_modules=[], target_parameters=targets, init_lora_weights=False)
        made = peft.get_peft_model(each, config)
        dk.accelerate(made, strict=True)
        tokens = torch.arange(12)[None]
        loss = made(input_ids=tokens, labels=tokens).loss
        loss.backward()
        assert dk.training_report(made).alarms == ()
        losses.append(loss.detach())
    assert torch.equal(losses[1], losses[2])
    assert not torch.equal(losses[0], losses[1])


@pytest.mark.parametrize("kind", ["mxfp4", "fp8"])
def test_modules_that_are_not_read_are_named(kind: str) -> None:
    """In the report of accelerate and of quantize_experts, with what to do."""
    if kind == "mxfp4":
        from transformers.integrations.mxfp4 import Mxfp4GptOssExperts

        config = transformers.GptOssConfig(hidden_size=64, intermediate_size=32, num_local_experts=E)
        made, remedy = Block(Mxfp4GptOssExperts(config)), "Mxfp4Config"
    else:
        from transformers.integrations.finegrained_fp8 import FP8Experts

        config = transformers.Qwen3MoeConfig(hidden_size=H, moe_intermediate_size=16, num_experts=E)
        made, remedy = Block(FP8Experts(config, block_size=(8, 8))), "FineGrainedFP8Config"
    expected = rf"stored in {kind.upper()} .*, which is not read here: load .* {remedy}\(dequantize=True\)"
    expected = expected.replace("load .* ", "load .*=")
    report = dk.quantize_experts(made)
    assert report.parameters == ()
    assert re.search(expected, str(report)), report
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    assert re.search(expected, str(dk.accelerate(peft.get_peft_model(made, config))))
