"""can_accelerate(): the report of a model that is not loaded is that of the loaded one, and nothing
is allocated.
"""

from pathlib import Path
from typing import Any

import peft
import pytest
import tiny_llama
import torch
import transformers
from peft_models import METHODS, config
from torch import nn
from transformers.quantizers import AutoHfQuantizer, quantizers_utils

import delora_kernels as dk
from delora_kernels.bases import plain
from delora_kernels.diagnostics import reasons
from delora_kernels.integrations.peft import before_loading
from delora_kernels.integrations.peft.fused import stored_bases
from delora_kernels.integrations.peft.fused.report import Report
from delora_kernels.integrations.peft.verdict import State

LINEARS: dict[str, Any] = {"target_modules": "all-linear", "task_type": "CAUSAL_LM"}


def llama(**options: Any) -> Any:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return transformers.LlamaConfig(**sizes | {"vocab_size": 60, "num_key_value_heads": 2} | options)


def described(report: Report) -> list[tuple[str, str, str | None, State]]:
    return [(layer.name, layer.method, layer.reason, layer.state) for layer in report.layers]


@pytest.mark.parametrize("method", METHODS)
def test_is_the_report_of_the_loaded_model(method: str, seed: int) -> None:
    torch.manual_seed(seed)
    before = torch.get_rng_state()
    found = dk.can_accelerate(llama(), config(method, **LINEARS))
    assert torch.equal(torch.get_rng_state(), before)
    loaded = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(llama()), config(method, **LINEARS))
    assert described(found) == described(dk.accelerate(loaded))
    assert len(found.fused) == 7
    assert str(found).startswith(f"would fuse 7 of 7 adapter layers (7 {method.replace('rslora', 'lora')})")
    assert (found.to_dict()["before_loading"], found.backend, found.proofs) == (True, None, ())


def test_what_is_declined_is_declined_before(seed: int) -> None:
    options = {"lora_dropout": 1.0} | LINEARS
    found = dk.can_accelerate(llama(), peft.LoraConfig(**options))
    assert {layer.code for layer in found.declined} == {"dropout"}
    loaded = peft.get_peft_model(transformers.AutoModelForCausalLM.from_config(llama()), peft.LoraConfig(**options))
    assert described(found) == described(dk.accelerate(loaded))


def test_nothing_of_the_size_of_a_weight_is_allocated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A weight would take 17 GB; afterwards the meta device is no place to run on again."""
    made: list[nn.Module] = []
    adapt = before_loading._adapt
    monkeypatch.setattr(before_loading, "_adapt", lambda *given: made.append(adapt(*given)) or made[-1])
    pissa = peft.LoraConfig(init_lora_weights="pissa", **LINEARS)
    assert len(dk.can_accelerate(llama(hidden_size=2**16, intermediate_size=2**17), pissa).fused) == 7
    tensors = [*made[0].parameters(), *made[0].buffers()]
    assert all(tensor.is_meta for tensor in tensors)
    assert pissa.init_lora_weights == "pissa"
    assert {layer.code for layer in dk.accelerate(made[0]).declined} == {"meta-device"}
    assert not plain._without_data.on


NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
NO_DORA = (State.OWN_FORWARD, "dora-on-stored-base")


@pytest.mark.parametrize(
    ("quantization", "lora", "dora"),
    [
        (NF4, (State.EXPECTED, "base-check-later"), (State.EXPECTED, "base-check-later")),
        ({"quant_method": "hqq"}, (State.EXPECTED, "base-check-later"), (State.EXPECTED, "base-check-later")),
        ({"load_in_8bit": True}, (State.RANK_TERM, "base-own-forward"), (State.OWN_FORWARD, "base-own-forward")),
        ({"quant_method": "fp8"}, (State.RANK_TERM, "base-own-forward"), (State.OWN_FORWARD, "base-own-forward")),
        ({"quant_method": "gptq"}, (State.RANK_TERM, "base-own-forward"), NO_DORA),
        ({"quant_method": "gptq", "backend": "triton"}, (State.RANK_TERM, "base-own-forward"), NO_DORA),
        ({"quant_method": "gptq", "backend": "torch"}, (State.EXPECTED, "base-check-later"), NO_DORA),
        ({"quant_method": "awq"}, (State.OWN_FORWARD, "layer-class"), (State.OWN_FORWARD, "layer-class")),
    ],
)
def test_bases_in_few_bits(quantization: dict[str, Any], lora: Any, dora: Any) -> None:
    """By the table of docs/stored-bases.md, and never "fused": no numeric check has run."""
    for method, expected in (("lora", lora), ("dora", dora)):
        found = dk.can_accelerate(llama(), config(method, **LINEARS), quantization)
        assert {(layer.state, layer.code) for layer in found.layers} == {expected}
        assert found.fused == ()
        assert len(found.deferred) == (7 if expected[0] == State.EXPECTED else 0)
        assert found.to_dict()["totals"]["expected"] == len(found.deferred)
    # of a checkpoint that is stored so, its own configuration says it
    of_checkpoint = dk.can_accelerate(llama(quantization_config=quantization), config("lora", **LINEARS))
    assert {layer.state for layer in of_checkpoint.layers} == {lora[0]}


def test_transformers_configs_and_what_they_leave_out(seed: int) -> None:
    options: dict[str, Any] = {"load_in_4bit": True, "llm_int8_skip_modules": ["model.layers.0.mlp"]}
    found = dk.can_accelerate(llama(), config("lora", **LINEARS), transformers.BitsAndBytesConfig(**options))
    states = {layer.name.rpartition(".")[2]: layer.state for layer in found.layers}
    assert [name for name, state in states.items() if state == State.FUSED] == ["gate_proj", "up_proj", "down_proj"]
    assert str(found).splitlines()[0] == "would fuse 3 of 7 adapter layers (3 lora), and 4 more are expected"
    targets = {"target_modules": ["lm_head", "q_proj"], "task_type": "CAUSAL_LM"}
    head = dk.can_accelerate(llama(), config("lora", **targets), NF4).layers
    assert [layer.state for layer in head] == [State.EXPECTED, State.FUSED]


def left_dense(model_config: Any, quantization: dict[str, Any], **lora: Any) -> set[str]:
    targets = {"target_modules": [*PROJECTIONS, "lm_head"], "task_type": "CAUSAL_LM"}
    layers = dk.can_accelerate(model_config, peft.LoraConfig(**targets | lora), quantization).layers
    return {layer.name.removeprefix("base_model.model.") for layer in layers if layer.state == State.FUSED}


PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
TOLD: tuple[Any, ...] = (
    None,
    [],
    ["proj"],
    ["self_attn"],
    ["layers.1"],
    ["model.layers.1"],
    ["model.layers.1."],
    ["model.layers.*.self_attn"],
    ["q_proj", "lm_head"],
)


@pytest.mark.parametrize("told", TOLD, ids=str)
def test_what_bitsandbytes_leaves_dense(told: Any) -> None:
    """As Transformers itself replaces linears, with more than 10 blocks."""
    pytest.importorskip("transformers", "5")
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, llm_int8_skip_modules=told)
    config = llama(num_hidden_layers=11)
    with torch.device("meta"):
        model: Any = transformers.AutoModelForCausalLM.from_config(config)
    AutoHfQuantizer.from_config(quantization)._process_model_before_weight_loading(model, device_map=None)
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    dense = {name for name, module in linears.items() if not isinstance(module, bitsandbytes.nn.Linear4bit)}
    assert left_dense(config, NF4 | {"llm_int8_skip_modules": told}) == dense


def test_what_is_kept_in_float32_is_left_dense() -> None:
    """T5's `wo`, told or not; a classifier's head, the last module, without a word."""
    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2, "vocab_size": 64}
    lora = {"target_modules": ["q", "wo"], "task_type": "SEQ_2_SEQ_LM"}
    for told in (None, ["nothing"]):
        found = left_dense(transformers.T5Config(**sizes), NF4 | {"llm_int8_skip_modules": told}, **lora)
        assert {name.rpartition(".")[2] for name in found} == {"wo"}
        assert len(found) == 2
    classifier = llama(architectures=["LlamaForSequenceClassification"])
    assert left_dense(classifier, NF4, target_modules=["q_proj", "score"], task_type=None) == {"score"}


@pytest.mark.parametrize(
    ("quantization", "dense"),
    [
        ({"ignore": ["re:.*(q|k)_proj$", "lm_head"]}, {"q_proj", "k_proj", "lm_head"}),
        ({"ignore": ["re:q_proj", "self_attn", "proj"]}, set()),
        ({"ignore": ["Linear"]}, {*PROJECTIONS, "lm_head"}),
        ({"quant_method": "fp8", "ignored_layers": "q_proj"}, {"q_proj"}),
        ({"quant_method": "awq", "modules_to_not_convert": ["q_proj"]}, {"q_proj", "lm_head"}),
        ({"quant_method": "hqq", "skip_modules": ["self_attn.q_proj", "k_proj"]}, {"q_proj"}),
        ({"quant_method": "hqq"}, {"lm_head"}),
    ],
)
def test_what_others_leave_dense(quantization: dict[str, Any], dense: set[str]) -> None:
    """compressed-tensors by names, classes and patterns, AWQ the head besides, HQQ by its tags."""
    found = left_dense(llama(), {"quant_method": "compressed-tensors"} | quantization)
    assert {name.rpartition(".")[2] for name in found} == dense


def test_the_older_rule_of_transformers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A name's end, a whole name, or parts that follow each other."""
    monkeypatch.delattr(quantizers_utils, "should_convert_module", raising=False)
    for told, dense in ((["q_proj"], {"q_proj"}), (["proj"], set()), (["mlp"], {"gate_proj", "up_proj", "down_proj"})):
        found = left_dense(llama(), NF4 | {"llm_int8_skip_modules": told})
        assert {name.rpartition(".")[2] for name in found} == dense


def test_a_gptq_kernel_is_named_or_chosen_at_loading() -> None:
    for backend, unless in ((None, True), ("auto", True), ("triton", False)):
        settings = {"quant_method": "gptq", "backend": backend}
        reason = dk.can_accelerate(llama(), config("lora", **LINEARS), settings).layers[0].reason
        assert str(reason).endswith("unless it is GPTQModel's torch kernel") == unless


def test_delora_on_bases_in_few_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """PEFT's raises; once allowed, it is as LoRA."""
    from peft.tuners.delora.model import DeloraModel

    own = DeloraModel.__dict__["_create_new_module"]
    monkeypatch.setattr(DeloraModel, "_create_new_module", own)
    found = dk.can_accelerate(llama(), config("delora", **LINEARS), NF4)
    assert {layer.code for layer in found.declined} == {"delora-on-stored-base"}
    dk.allow_delora_on_stored_bases()
    assert len(dk.can_accelerate(llama(), config("delora", **LINEARS), NF4).deferred) == 7
    monkeypatch.undo()


def test_own_methods_and_an_untested_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    dk.register_peft_methods()
    found = dk.can_accelerate(llama(), dk.EtherConfig(target_modules=["q_proj"]))
    assert [(layer.method, layer.fused) for layer in found.layers] == [("ether", True)]
    monkeypatch.setattr(
        before_loading, "why_not_peft", lambda: "PEFT 9 is new: its layers on stored bases are not fused"
    )
    declined = dk.can_accelerate(llama(), config("lora", **LINEARS), NF4).declined
    assert {layer.code for layer in declined} == {"peft-version"}


def test_another_task_and_a_folder(tmp_path: Path) -> None:
    llama(architectures=["LlamaForCausalLM"]).save_pretrained(tmp_path)
    options = {"target_modules": ["q_proj"], "task_type": "SEQ_CLS"}
    found = dk.can_accelerate(tmp_path, peft.LoraConfig(**options))
    assert [layer.fused for layer in found.layers] == [True]
    assert len(dk.can_accelerate(str(tmp_path), peft.LoraConfig(target_modules=["q_proj"])).layers) == 1


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        ({"model_config": 3}, TypeError, "can_accelerate: model_config must be a Transformers config"),
        (
            {"model_config": "/no/such/folder"},
            ValueError,
            "model_config must be one that Transformers finds, got '/no/",
        ),
        (
            {"peft_config": peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)},
            ValueError,
            "can_accelerate: model must hold PEFT adapter layers, got a PeftModelForCausalLM without any",
        ),
        ({"model_config": transformers.PretrainedConfig()}, ValueError, "model_config must be of a model"),
        (
            {"model_config": llama(hidden_act="no such")},
            ValueError,
            "model_config must be one that builds a model, got ",
        ),
        ({"peft_config": "lora"}, TypeError, "can_accelerate: peft_config must be a PEFT config, got str"),
        ({"peft_config": peft.LoraConfig(target_modules=["nowhere"])}, ValueError, "peft_config must be one that fits"),
        ({"quantization_config": 4}, TypeError, "quantization_config must be one of Transformers', got int"),
        ({"quantization_config": {"quant_method": "new"}}, ValueError, "quantization_config must be of one of bitsand"),
    ],
)
def test_errors(change: dict[str, Any], error: type[Exception], text: str) -> None:
    arguments: dict[str, Any] = {"model_config": llama(), "peft_config": config("lora", **LINEARS)} | change
    with pytest.raises(error) as raised:
        dk.can_accelerate(**arguments)
    assert text in str(raised.value)


def test_every_form_is_in_the_table() -> None:
    """Each PEFT layer class on stored bases that is fused is reached by a quantisation's name."""
    reached = {stored.layer for stored in before_loading._LAYERS.values()}
    for settings in (NF4, NF4 | {"load_in_4bit": False, "load_in_8bit": True}, {"quant_method": "torchao", "given": 0}):
        reached.add(before_loading._stored(settings).layer)
    assert reached >= stored_bases.CLASSES
    assert all(reasons.code_of(f"its base will be {name}, which runs its own forward") for name in reached)


def test_with_the_library(seed: int) -> None:
    """What was expected of nf4 is what accelerate() finds."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    from stored_layers import bitsandbytes_4bit

    model: Any = tiny_llama.llama("lora", seed, blocks=1).unload()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            stored = bitsandbytes_4bit(module.out_features, module.in_features, bias=module.bias is not None)
            model.set_submodule(name, stored)
    loaded = dk.accelerate(peft.get_peft_model(model, config("lora", **LINEARS)))
    found = dk.can_accelerate(model.config, config("lora", **LINEARS), NF4)
    assert [layer.name for layer in found.deferred] == [layer.name for layer in loaded.fused]
