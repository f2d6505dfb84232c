"""load_with_quantized_experts: the same model as quantised afterwards, and never all of it in full
precision.
"""

import os
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn
from torch.nn.modules import module as all_modules
from torch.profiler import ProfilerActivity, profile

import delora_kernels as dk
from delora_kernels.bases.packed_experts import PackedExperts

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
transformers: Any = pytest.importorskip("transformers", "5")

torch.set_num_threads(1)

TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LAYERS, E, H, INNER = 5, 8, 64, 64
LAYER = E * 3 * H * INNER * 4
"""Bytes of a layer's experts in float32."""


def saved(folder: Path, seed: int, family: str = "Qwen3Moe") -> Any:
    """Save a small model in many shards, and return what loads it."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": H, "num_hidden_layers": LAYERS, "num_attention_heads": 2, "num_key_value_heads": 1}
    sizes |= {"head_dim": 16, "vocab_size": 32, "intermediate_size": INNER, "num_experts_per_tok": 2}
    sizes |= {"moe_intermediate_size": INNER, "num_experts": E} if family == "Qwen3Moe" else {"num_local_experts": E}
    config = getattr(transformers, f"{family}Config")(**sizes)
    getattr(transformers, f"{family}ForCausalLM")(config).save_pretrained(folder, max_shard_size="400KB")
    assert len(list(folder.glob("*.safetensors"))) > LAYERS
    return partial(transformers.AutoModelForCausalLM.from_pretrained, folder)


def packed_of(model: nn.Module) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if isinstance(p, PackedExperts)}


@pytest.mark.parametrize("family", ["Qwen3Moe", "GptOss"])
def test_the_model_is_that_of_quantising_afterwards(family: str, seed: int, tmp_path: Path) -> None:
    """Whether a checkpoint holds experts one by one or as one parameter."""
    load = saved(tmp_path, seed, family)
    model, report = dk.load_with_quantized_experts(load, blocksize=32, double_quant=True)
    other = load()
    expected = dk.quantize_experts(other, blocksize=32, double_quant=True)
    assert report == expected
    assert len(report.parameters) == 2 * LAYERS
    assert set(packed_of(model)) == set(report.parameters)
    assert not any(p.requires_grad for p in packed_of(model).values())
    ours, theirs = model.state_dict(), other.state_dict()
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(ours[name] + 0, value + 0), name
    assert not all_modules._global_parameter_registration_hooks


def test_peak_memory_and_training(seed: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beyond what stays at most a layer's experts, of them gate and up twice; then it trains."""
    monkeypatch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "0")
    load = saved(tmp_path, seed)
    load()
    kept: list[Any] = []

    def peak(run: Any) -> int:
        """Most bytes at once; files are mapped, not read."""
        files = {path.stat().st_size for path in tmp_path.glob("*.safetensors")}
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            kept[:] = [run()]
        alive = most = 0
        for event in sorted(record.profiler.kineto_results.events(), key=lambda each: each.start_ns()):
            if event.name() == "[memory]" and abs(event.nbytes()) not in files:
                alive += event.nbytes()
                most = max(most, alive)
        return most

    def reads_ahead(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("its threads would read what nobody has quantised")  # which the profiler does not see

    assert peak(load) > LAYERS * LAYER
    monkeypatch.setattr(transformers.core_model_loading, "ThreadPoolExecutor", reads_ahead)
    found = peak(partial(dk.load_with_quantized_experts, load))
    model, report = kept[0]
    rest = sum(p.numel() * 4 for p in model.parameters() if not isinstance(p, PackedExperts))
    working = 2 * H * INNER * 4 * 16  # of quantising one expert
    assert found <= report.bytes_after + rest + LAYER * 5 / 3 + working
    assert os.environ["HF_DEACTIVATE_ASYNC_LOAD"] == "0"
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=[], target_parameters=TARGETS))
    dk.accelerate(adapted, strict=True)
    tokens = torch.arange(24)[None]
    optimizer = torch.optim.AdamW([p for p in adapted.parameters() if p.requires_grad], lr=1e-2)
    losses = []
    with dk.watch_training(adapted, optimizer):
        for _ in range(4):
            loss = adapted(input_ids=tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    assert dk.training_report(adapted).alarms == ()


def test_experts_that_the_checkpoint_lacks_are_quantised_afterwards(seed: int, tmp_path: Path) -> None:
    """They are drawn in full precision first, as Transformers draws them."""
    load = saved(tmp_path, seed)
    config = transformers.AutoConfig.from_pretrained(tmp_path, num_hidden_layers=LAYERS + 1)
    model, report = dk.load_with_quantized_experts(partial(load, config=config))
    assert len(packed_of(model)) == len(report.parameters) == 2 * (LAYERS + 1)
    drawn = model.get_parameter(report.parameters[-1]) + 0
    assert 0.01 < float(drawn.std()) < 0.03  # initializer_range is 0.02


def test_what_raises(seed: int, tmp_path: Path) -> None:
    load = dk.load_with_quantized_experts
    with pytest.raises(TypeError, match="load must be a function without arguments, got str; pass partial"):
        load("folder")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="load_with_quantized_experts: blocksize must be"):
        load(lambda: nn.Linear(2, 2), blocksize=3)
    with pytest.raises(TypeError, match="load must be one that returns a model, got NoneType"):
        load(lambda: None)  # type: ignore[arg-type, return-value]
    with pytest.raises(ValueError, match="one that returns a model with experts, got a Linear without any"):
        load(lambda: nn.Linear(2, 2))
    before = os.environ.get("HF_DEACTIVATE_ASYNC_LOAD")

    def broken() -> Any:
        raise OSError("no such file")

    with pytest.raises(OSError, match="no such file"):
        load(broken)
    assert os.environ.get("HF_DEACTIVATE_ASYNC_LOAD") == before
    assert not all_modules._global_parameter_registration_hooks
