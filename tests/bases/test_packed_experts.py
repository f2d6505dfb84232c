"""Experts in 4 bits: bitsandbytes' own blocks, read by groups under a budget."""

import copy
from typing import Any

import peft
import pytest
import torch
from expert_models import E, H, adapted, assert_close, block, randomise, routed, step, up_name
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.bases.packed_experts import PackedExperts, Storing
from delora_kernels.bases.stored_experts import StoredExperts
from delora_kernels.diagnostics.allocations import allocations
from delora_kernels.integrations.peft.fused import experts_known

pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
pytest.importorskip("transformers", "5")

torch.set_num_threads(1)


def experts_of(model: nn.Module) -> Any:
    return next(module for module in model.modules() if hasattr(module, "has_gate"))


def dense_copy(model: Any) -> Any:
    """The model with what its experts' numbers stand for as plain weights, run by PEFT."""
    made = copy.deepcopy(model)
    dk.restore(made)
    experts = experts_of(made)
    for name, weight in experts._parameters.items():
        if isinstance(weight, PackedExperts):
            whole = weight.dense(0, len(weight), weight.dtype)
            experts._parameters[name] = nn.Parameter(whole, requires_grad=False)
    return made


SHAPES = {"whole blocks": (5, 16, 24), "short blocks": (3, 7, 10), "odd": (2, 5, 9), "whole scales": (3, 64, 128)}


@pytest.mark.parametrize("double_quant", [False, True], ids=["once", "twice"])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_blocks_are_bitsandbytes_own(shape: tuple[int, ...], quant_type: str, double_quant: bool, seed: int) -> None:
    """Every expert as bitsandbytes quantises it alone; any run of them is dequantised to the same
    bits.
    """
    import bitsandbytes.functional as library

    torch.manual_seed(seed)
    for dtype in (torch.float32, torch.bfloat16):
        weight = torch.randn(shape, dtype=dtype)
        made = PackedExperts.quantised(weight, Storing(quant_type, 32, 256, double_quant))
        assert (made.shape, made.dtype, made.device) == (weight.shape, dtype, weight.device)
        how = {"blocksize": 32, "quant_type": quant_type, "compress_statistics": double_quant}
        alone = [library.quantize_4bit(each.contiguous(), **how) for each in weight]
        expected = torch.stack([library.dequantize_4bit(codes, state) for codes, state in alone])
        for first in range(shape[0]):
            assert torch.equal(made[first], expected[first])
            for last in range(first + 1, shape[0] + 1):
                assert torch.equal(made.dense(first, last, dtype), expected[first:last])
        assert torch.equal(made + 0, expected)
        assert torch.equal(made[-1].mT, expected[-1].mT)
        with pytest.raises(IndexError):
            made[shape[0]]


@pytest.mark.parametrize("workspace_mib", [1e-9, 2.2 * 16 * 16 * 4 / 2**20, 256], ids=["one", "two", "all"])
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "nemotron_h", "muse_spark"])
@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
def test_values_and_every_gradient(family: str, implementation: str, workspace_mib: float, seed: int) -> None:
    """By PEFT and accelerated: as the dense weights that the blocks stand for, also where experts
    have no tokens.
    """
    model = adapted(block(family, implementation, seed=seed), seed=seed + 1)
    report = dk.quantize_experts(model, workspace_mib=workspace_mib)
    assert len(report.parameters) == 2
    assert report.left == ()
    inputs = routed(9, seed)
    theirs = step(dense_copy(model), inputs)
    assert_close(step(model, inputs), theirs)  # PEFT, on all experts dense
    dk.accelerate(model, strict=True)
    assert_close(step(model, inputs), theirs)
    assert dk.training_report(model).alarms == ()


def test_groups_have_tokens_and_fit_the_budget(seed: int) -> None:
    weight = PackedExperts.quantised(torch.randn(6, 4, 8), Storing("nf4", 32, 3 * 4 * 8 * 4 / 2**20))
    stored = StoredExperts(weight, is_transposed=False)
    offsets = torch.tensor([2, 3, 5, 9, 9, 10])
    found = list(stored.groups(offsets, 12, torch.float32))
    assert found == [(0, 3, slice(0, 5)), (3, 4, slice(5, 9)), (5, 6, slice(9, 10))]
    assert [last - first for first, last, _ in stored.groups(offsets, 12, torch.float64)] == [1, 1, 1, 1, 1]
    with pytest.raises(ValueError, match="offsets must not fall and end at most at x's 9 rows"):
        list(stored.groups(offsets, 9, torch.float32))


@pytest.mark.parametrize("accelerated", [True, False], ids=["accelerated", "PEFT"])
def test_peak_memory(accelerated: bool, seed: int) -> None:
    """A Qwen3-MoE whose experts exceed the budget 8 times trains in packed + budget + activations;
    PEFT's own forward does not.
    """
    import transformers

    torch.manual_seed(seed)
    experts = 64
    sizes: dict[str, Any] = {"hidden_size": 64, "moe_intermediate_size": 64, "num_experts": experts, "vocab_size": 32}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    model = transformers.Qwen3MoeForCausalLM(
        transformers.Qwen3MoeConfig(**sizes, num_experts_per_tok=4, intermediate_size=32)
    )
    whole = 2 * experts * 3 * 64 * 64 * 4  # bytes of all experts
    budget, tokens = whole / 8, torch.arange(32)[None]
    targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]

    def peak(config: Any) -> int:
        """Bytes beyond the model itself at the peak of a step."""
        made = peft.get_peft_model(copy.deepcopy(model), config)
        if accelerated:
            dk.accelerate(made)
        return allocations(lambda: made(input_ids=tokens, labels=tokens).loss.backward()).peak

    activations = peak(peft.LoraConfig(r=2, target_modules=["q_proj"]))  # those of the frozen experts
    report = dk.quantize_experts(model, workspace_mib=budget / 2**20)
    assert (report.bytes_before, report.bytes_after) == (whole, whole * (1 / 8 + 1 / 64))
    found = peak(peft.LoraConfig(r=2, target_modules=[], target_parameters=targets))
    factors = 2 * 2 * experts * 2 * (64 + 128 + 64 + 64) * 4  # and their gradients
    assert (found <= budget + 1.25 * activations + factors) == accelerated, (found, budget, activations, factors)


def test_nothing_dense_is_kept_or_left(seed: int) -> None:
    """One group at a time, forward and backward: the dense experts of one are gone before the
    next.
    """
    model = adapted(block(seed=seed, hidden_size=H), seed=seed + 1)
    dk.quantize_experts(model, workspace_mib=1e-9)
    dk.accelerate(model)
    alive: list[Any] = []
    seen: list[int] = []
    own = PackedExperts.dense

    def watched(self: PackedExperts, first: int, last: int, dtype: torch.dtype) -> Tensor:
        assert last - first == 1
        seen.append(sum(not weak.expired() for weak in alive))
        made = own(self, first, last, dtype)
        alive.append(torch.multiprocessing.reductions.StorageWeakRef(made.untyped_storage()))
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PackedExperts, "dense", watched)
        step(model, routed(9, seed))
    assert seen == [0] * (2 * 2 * len(set(routed(9, seed)[1].flatten().tolist())))


def test_copies_that_train_are_left(seed: int) -> None:
    """modules_to_save: the module beside is quantised, its copy goes on training."""
    config = peft.LoraConfig(target_modules=["other"], modules_to_save=["experts"])
    made = block(seed=seed)
    made.other = nn.Linear(2, 2)
    model = peft.get_peft_model(made, config)
    report = dk.quantize_experts(model)
    inner = "base_model.model.experts"
    assert set(report.parameters) == {f"{inner}.original_module.{name}" for name in ("gate_up_proj", "down_proj")}
    assert (f"{inner}.modules_to_save.default", "it trains (modules_to_save)") in report.left
    found = step(model, routed(9, seed))
    assert sum("modules_to_save" in name for name in found) == 2


def test_adapters_are_put_on_afterwards_and_resumed(seed: int, tmp_path: Any) -> None:
    """PEFT finds the parameters by their names; what it saved is loaded on experts quantised
    anew.
    """
    models = []
    for _ in range(2):
        made = block(seed=seed)
        dk.quantize_experts(made)
        models.append(made)
    model = adapted(models[0], seed=seed + 1)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(models[1], tmp_path, is_trainable=True)
    for each in (model, loaded):
        dk.accelerate(each, strict=True)
    inputs = routed(9, seed)
    assert_close(step(loaded, inputs), step(model, inputs), 0)
    randomise(loaded, seed + 5)
    result = dk.export_lora(loaded, tmp_path / "exported")
    assert result.ranks.keys() == {"experts.gate_up_proj", "experts.down_proj"}


def test_what_is_left_and_what_raises() -> None:
    with pytest.raises(TypeError, match="quantize_experts: model must be a torch.nn.Module, got int"):
        dk.quantize_experts(3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="model must be one with experts, got a Linear without any"):
        dk.quantize_experts(nn.Linear(2, 2))
    for options in ({"quant_type": "int4"}, {"blocksize": 48}, {"blocksize": 64.0}, {"workspace_mib": 0}):
        (name,) = options
        with pytest.raises(ValueError, match=f"quantize_experts: {name} must be"):
            dk.quantize_experts(block(), **options)  # type: ignore[arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experts_known, "READ", {})
        report = dk.quantize_experts(block("qwen3_moe", "eager"))
    assert report.parameters == ()
    assert "left experts: the eager forward of qwen3_moe" in str(report)
    model = adapted(block())
    model.merge_adapter()
    with pytest.raises(ValueError, match=r"one without merged adapters, got one with those of .*experts merged"):
        dk.quantize_experts(model)
    model.unmerge_adapter()
    dk.quantize_experts(model)
    experts_of(model)._parameters["down_proj"].requires_grad_()
    (first, *_) = dk.accelerate(model).declined
    assert "its down_proj is stored in 4 bits, and is to train" in str(first)
    assert len(experts_of(model)._parameters[up_name(block())]) == E


def test_bitsandbytes_own_parametrization_is_named() -> None:
    from bitsandbytes.nn.parametrize import replace_parameter_4bit

    made = block()
    for name in ("gate_up_proj", "down_proj"):
        replace_parameter_4bit(made.experts, name, quant_type="nf4")
    report = dk.accelerate(adapted(made))
    assert "its weights are bitsandbytes' parametrizations: load them in 16 bits and call quantize_exp" in str(report)
