"""export_lora: its folder, loaded by PEFT into a fresh base, computes what the exported model does;
or it refuses.
"""

import copy
import os
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from exports import assert_close, check, check_standard, export, llama, load, settings, weights
from peft_models import Small, config
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import delora_kernels as dk
from delora_kernels.integrations.peft.export.low_rank_terms import survey

torch.set_num_threads(1)

ALL = ["first", "second", "third"]


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> None:
    torch.manual_seed(seed)


@pytest.mark.parametrize("bare", [False, True], ids=["PeftModel", "injected"])
@pytest.mark.parametrize("fused", [False, True], ids=["eager", "fused"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("method", ["delora", "lora", "rslora"])
def test_peft_adapters(method: str, dtype: torch.dtype, fused: bool, bare: bool, tmp_path: Path) -> None:
    base = Small(conv1d=method != "delora").to(dtype)
    options = config(method, target_modules=ALL, rank_pattern={"third": 5}, dropout_p=0.3)
    make = (lambda m: peft.inject_adapter_in_model(options, m)) if bare else lambda m: peft.get_peft_model(m, options)
    made = make(copy.deepcopy(base))
    if fused:
        dk.accelerate(made, strict=True)
    loaded = check(made, base, tmp_path / "new" / "folder", torch.randn(2, 5, 12, dtype=dtype))
    layer = loaded.base_model.model.third
    assert layer.lora_A["default"].weight.dtype == dtype
    assert layer.scaling["default"] == 1
    assert layer.r["default"] == 5
    assert settings(tmp_path / "new" / "folder")["auto_mapping"] == {
        "base_model_class": "Small",
        "parent_library": "peft_models",
    }


def test_clamped_norms(tmp_path: Path) -> None:
    """B = 0 (PEFT's start), a B and an A shorter than PEFT's clamp, λ = 0 and below."""
    base = Small(conv1d=False)
    made = peft.get_peft_model(copy.deepcopy(base), config("delora", r=4, target_modules=ALL))
    with torch.no_grad():
        made.base_model.model.first.delora_B["default"][:, 0] = 0
        made.base_model.model.first.delora_B["default"][:, 1] *= 1e-5
        made.base_model.model.first.delora_A["default"][2] *= 1e-6
        made.base_model.model.second.delora_lambda["default"].fill_(0)
        made.base_model.model.third.delora_lambda["default"].neg_()
    check(made, base, tmp_path, torch.randn(7, 12))
    tensors = weights(tmp_path)
    assert tensors["base_model.model.first.lora_B.weight"][:, 0].abs().max() == 0
    assert tensors["base_model.model.second.lora_B.weight"].abs().max() == 0


def test_llama(tmp_path: Path) -> None:
    """21 layers, so many that PEFT shortens the list of targets; ranks that differ; task and base
    model carried.
    """
    base = llama(tie_word_embeddings=True)
    patterns: Any = {
        "rank_pattern": {r"layers\.1\.self_attn\.q_proj": 2, "down_proj": 5},
        "lambda_pattern": {"o_proj": 9},
    }
    options = config("delora", r=3, target_modules="all-linear", task_type="CAUSAL_LM", **patterns)
    made = peft.get_peft_model(copy.deepcopy(base), options)
    made.peft_config["default"].base_model_name_or_path = "someone/tiny-llama"
    dk.accelerate(made, strict=True)
    loaded = check(made, base, tmp_path, torch.randint(1, 64, (2, 9)))
    values = settings(tmp_path)
    assert values["target_modules"] == [
        name for name, module in base.named_modules() if isinstance(module, nn.Linear) and name != "lm_head"
    ]
    assert values["r"] == 5
    assert values["rank_pattern"].pop(r"^model\.layers\.1\.self_attn\.q_proj") == 2
    assert set(values["rank_pattern"].values()) == {3}
    assert len(values["rank_pattern"]) == 21 - 3 - 1
    assert (values["task_type"], values["auto_mapping"]) == ("CAUSAL_LM", None)
    assert values["base_model_name_or_path"] == "someone/tiny-llama"
    assert 'base_model: "someone/tiny-llama"\n' in (tmp_path / "README.md").read_text()
    assert isinstance(loaded, peft.PeftModelForCausalLM)


def test_transformers_own_loader(tmp_path: Path) -> None:
    pytest.importorskip("peft.utils.transformers_weight_conversion", reason="this Transformers wants a newer PEFT")
    base: Any = llama()
    made = peft.get_peft_model(copy.deepcopy(base), config("delora", target_modules="all-linear"))
    export(made, tmp_path)
    base.load_adapter(str(tmp_path))
    ids = torch.randint(1, 64, (2, 9))
    with torch.no_grad():
        assert_close(base(ids).logits, made(ids).logits)


class Tricky(nn.Module):
    """Layers whose names are ends, or as a regex patterns, of each other's."""

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(6, 6)
        self.deep: Any = nn.ModuleDict({"q": nn.Linear(6, 6), "er": nn.ModuleDict({"q": nn.Linear(6, 6)})})
        self.deepXq = nn.Linear(6, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.deepXq(self.deep["er"]["q"](self.deep["q"](self.q(x))))
        return y


@pytest.mark.parametrize(
    ("targets", "regex"),
    [
        ("q|deep.q|deep.er.q|deepXq", False),
        ("q", True),
        (r"deep\.q|q", True),
        (r"deep\.q", False),
        (r"deep\.q|deep\.er\.q", False),
    ],
)
def test_names_match_exactly(targets: str, regex: bool, tmp_path: Path) -> None:
    base = Tricky()
    patterns = {r"^q": 2, r"^deep\.q": 3, r"^deep\.er\.q": 4}
    made = peft.get_peft_model(
        copy.deepcopy(base), config("delora", r=1, target_modules=targets, rank_pattern=patterns)
    )
    loaded = check(made, base, tmp_path, torch.randn(5, 6))
    names = {name: layer for name, layer in loaded.base_model.model.named_modules() if hasattr(layer, "lora_A")}
    ranks = {"q": 2, "deep.q": 3, "deep.er.q": 4, "deepXq": 1}
    assert {name: layer.r["default"] for name, layer in names.items()} == {
        name: rank for name, rank in ranks.items() if re.fullmatch(targets, name)
    }
    assert isinstance(settings(tmp_path)["target_modules"], str) == regex


@pytest.mark.parametrize("method", ["delora", "lora"])
def test_several_active_adapters_are_stacked(method: str, tmp_path: Path) -> None:
    """Ranks add up where both act; one by name; LoRA's scales and dtypes may differ."""
    base, x = Small(conv1d=method == "lora"), torch.randn(4, 12)
    made = peft.get_peft_model(copy.deepcopy(base), config(method, r=3, target_modules=ALL))
    other = config("rslora" if method == "lora" else method, r=2, target_modules=["second"])
    made.add_adapter("other", other)
    third = config(method, r=4, target_modules=["third"])
    made.add_adapter("unused", third)
    made.base_model.set_adapter(["default", "other"])
    if method == "lora":
        made.base_model.model.second.set_scale("other", 0.3)
        made.base_model.model.second.lora_A["other"].double()
        made.base_model.model.second.lora_B["other"].double()
        made.base_model.model.second.cast_input_dtype_enabled = True
    made.eval()
    with torch.no_grad():
        first, second, last = (made.base_model.model.get_submodule(name) for name in ALL)
        y = nn.functional.gelu(first(x))
        delta = sum(second.get_delta_weight(name).double() for name in ("default", "other"))
        weight = second.base_layer.weight.double() + delta
        y = nn.functional.gelu(y.double() @ (weight if method == "lora" else weight.T) + second.base_layer.bias)
        expected = last(y.float())
    result = export(made, tmp_path / "both")
    check_standard(tmp_path / "both", result)
    assert result.ranks == {"first": 3, "second": 5, "third": 3}
    assert_close(load(base, tmp_path / "both")(x), expected)
    for name, ranks in {"default": {"first": 3, "second": 3, "third": 3}, "other": {"second": 2}}.items():
        made.set_adapter(name)
        if method == "lora" and name == "other":
            made.base_model.model.second.float()
        expected = made(x)
        made.set_adapter("unused")
        result = export(made, tmp_path / name, adapter=name)
        assert result.ranks == ranks
        assert_close(load(base, tmp_path / name)(x), expected)


@pytest.mark.parametrize("targets", [["second"], ALL])
def test_conv1d(targets: list[str], tmp_path: Path) -> None:
    base = Small(conv1d=True)
    made = peft.get_peft_model(copy.deepcopy(base), config("lora", target_modules=targets, fan_in_fan_out=True))
    loaded = check(made, base, tmp_path, torch.randn(4, 12))
    assert settings(tmp_path)["fan_in_fan_out"] is True
    assert isinstance(loaded.base_model.model.second.base_layer, Conv1D)
    assert loaded.base_model.model.second.fan_in_fan_out
    plain = peft.get_peft_model(copy.deepcopy(base), config("lora", target_modules=["first"]))
    export(plain, tmp_path / "plain")
    assert settings(tmp_path / "plain")["fan_in_fan_out"] is False


def test_nested_layers_are_stacked(tmp_path: Path) -> None:
    """LoRA injected around DeLoRA: two PEFT layers on one linear."""
    base = Small(conv1d=False)
    made = peft.inject_adapter_in_model(config("delora", r=2, target_modules=["first"]), copy.deepcopy(base))
    inner: Any = made.first
    outer: Any = peft.inject_adapter_in_model(config("lora", r=3, target_modules=["first"]), copy.deepcopy(base)).first
    outer.base_layer, made.first = inner, outer
    result = export(made, tmp_path)
    assert result.ranks == {"first": 5}
    x = torch.randn(5, 12)
    assert_close(load(base, tmp_path)(x), made(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_factors(dtype: torch.dtype, tmp_path: Path) -> None:
    """Written as they are, one rounding each; dtype=float32 keeps the folded values exact."""
    base = Small(conv1d=False).to(dtype)
    made = peft.get_peft_model(copy.deepcopy(base), config("delora", target_modules=ALL), autocast_adapter_dtype=False)
    exact = copy.deepcopy(made).double().base_model.model
    for folder, written in (("same", dtype), ("wide", torch.float32)):
        export(made, tmp_path / folder, dtype=None if folder == "same" else written)
        for name in ALL:
            A, B = (weights(tmp_path / folder)[f"base_model.model.{name}.lora_{role}.weight"] for role in "AB")
            assert (A.dtype, B.dtype) == (written, written)
            assert_close(B.double() @ A.double(), exact.get_submodule(name).get_delta_weight("default"), written)
    assert load(base, tmp_path / "same").base_model.model.first.lora_A["default"].weight.dtype == torch.float32


@pytest.mark.parametrize(("method", "bias"), [("delora", "all"), ("delora", "delora_only"), ("lora", "lora_only")])
@pytest.mark.parametrize("bare", [False, True], ids=["PeftModel", "injected"])
def test_trained_biases(method: str, bias: Any, bare: bool, tmp_path: Path) -> None:
    base = Small(conv1d=False)
    options = config(method, target_modules=["first"], bias=bias)
    fresh = copy.deepcopy(base)
    made: Any = peft.inject_adapter_in_model(options, fresh) if bare else peft.get_peft_model(fresh, options)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if name.endswith("bias"):
                assert parameter.requires_grad == (bias == "all" or "first" in name)
                parameter.add_(torch.randn_like(parameter) * parameter.requires_grad)
    loaded = check(made, base, tmp_path, torch.randn(4, 12))
    keys = {"base_model.model.first.base_layer.bias"} | ({"base_model.model.second.bias"} if bias == "all" else set())
    assert {key for key in weights(tmp_path) if key.endswith("bias")} == keys
    assert settings(tmp_path)["bias"] == ("all" if bias == "all" else "lora_only")
    if bias == "all":
        assert torch.equal(loaded.base_model.model.second.bias, survey(made).base["second"].get_parameter("bias"))


def test_modules_to_save(tmp_path: Path) -> None:
    """A classifier that PEFT adds to modules_to_save by the task, trained; of two adapters the
    exported one's.
    """
    base = transformers.LlamaForSequenceClassification(llama().config).eval()
    options: Any = {"target_modules": ["q_proj", "down_proj"], "task_type": "SEQ_CLS"}
    made = peft.get_peft_model(copy.deepcopy(base), config("delora", **options))
    made.add_adapter("other", config("delora", modules_to_save=["embed_tokens"], **options))
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "modules_to_save" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    ids = torch.randint(1, 64, (3, 9))
    loaded = check(made, base, tmp_path / "default", ids)
    extra = {key for key in weights(tmp_path / "default") if ".lora_" not in key}
    assert extra == {"base_model.model.score.weight"}
    assert settings(tmp_path / "default")["modules_to_save"] == ["score"]
    assert isinstance(loaded, peft.PeftModelForSequenceClassification)
    made.set_adapter("other")
    expected = made.eval()(ids).logits
    made.set_adapter("default")
    export(made, tmp_path / "other", adapter="other")
    assert set(settings(tmp_path / "other")["modules_to_save"]) == {"score", "model.embed_tokens"}
    assert_close(load(base, tmp_path / "other")(ids).logits, expected)


def test_result_and_folder(tmp_path: Path) -> None:
    """A path-like result with one line of text; a LoRA folder is replaced, its card kept."""
    base = Small(conv1d=False)
    made = peft.get_peft_model(copy.deepcopy(base), config("delora", target_modules=ALL, rank_pattern={"third": 5}))
    result = export(made, tmp_path)
    assert os.fspath(result) == str(tmp_path)
    size = f"{result.bytes / 2**20:.1f} MiB"
    assert str(result) == f"LoRA adapter of 3 layers, r = 3 to 5, {size}: {tmp_path}"
    (tmp_path / "README.md").write_text("mine")
    with torch.no_grad():
        made.base_model.model.first.delora_lambda["default"].mul_(2)
    export(made, tmp_path)
    assert (tmp_path / "README.md").read_text() == "mine"
    x = torch.randn(4, 12)
    assert_close(load(base, result)(x), made(x))
    made.save_pretrained(tmp_path / "trained")
    before = {file.name: file.read_bytes() for file in (tmp_path / "trained").iterdir()}
    with pytest.raises(ValueError, match="directory must be free or a LoRA adapter's, got a folder with a DELORA"):
        export(made, tmp_path / "trained")
    assert {file.name: file.read_bytes() for file in (tmp_path / "trained").iterdir()} == before
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="directory must be a folder or new, got a file"):
        export(made, tmp_path / "file")


def test_shared_tensors_are_written_twice(tmp_path: Path) -> None:
    """Two layers with the same trained bias and the same A, which one of them has as its B too,
    transposed.
    """
    base = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
    base[1].bias = base[0].bias
    made = peft.get_peft_model(copy.deepcopy(base), config("lora", target_modules=["0", "1"], bias="all"))
    first, second = made.base_model.model
    second.lora_A["default"].weight = first.lora_A["default"].weight
    second.lora_B["default"].weight = nn.Parameter(first.lora_A["default"].weight.detach().t())
    check(made, base, tmp_path, torch.randn(4, 6))
    assert {"0", "1"} == {key.split(".")[2] for key in weights(tmp_path) if key.endswith(".bias")}


def test_a_refused_adapter_does_not_stop_another(tmp_path: Path) -> None:
    """A model with a DoRA and a plain adapter: the plain one by name; layers without it are left
    out.
    """
    base = Small(conv1d=True)
    made = peft.get_peft_model(copy.deepcopy(base), config("dora", target_modules=ALL))
    made.add_adapter("plain", config("lora", target_modules=["first"]))
    assert export(made, tmp_path, adapter="plain").ranks == {"first": 3}
    made.set_adapter("plain")
    x = torch.randn(4, 12)
    assert_close(load(base, tmp_path)(x), made(x))
