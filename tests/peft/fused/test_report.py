"""A report in JSON's types, its codes, and the backend in its first line."""

import json
import pickle
from typing import Any

import peft
import peft_models
import pytest
import tiny_llama
import torch
from torch import nn

import delora_kernels as dk
from delora_kernels.diagnostics import reasons, versions
from delora_kernels.integrations.peft.fused import report as reports
from delora_kernels.integrations.peft.fused.report import LayerReport, Report
from delora_kernels.integrations.peft.verdict import State

CODES = {reason.code for reason in reasons.REASONS}


def declined(seed: int) -> Any:
    """A model of three layers: one fused, one whose rank term is, one that PEFT's own forward
    runs.
    """
    model = peft_models.model("lora", seed)
    layers = model.base_model.model
    layers.second.base_layer.register_forward_hook(lambda *_: None)
    layers.third.lora_dropout["default"] = nn.Dropout(0.5, inplace=True)
    return model


def test_all_of_it_in_jsons_types(seed: int) -> None:
    report = dk.accelerate(declined(seed))
    found = report.to_dict()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["schema"] == 1
    assert found["versions"].keys() == {"delora_kernels", *versions.TABLE}
    assert found["versions"]["peft"] == peft.__version__
    assert found["backends"]["eager"] is None
    assert found["backends"]["cuda"]["code"] == "backend-not-here"
    assert found["backend"] == "eager"
    layers = {layer["name"].rpartition(".")[2]: layer for layer in found["layers"]}
    assert [(layer["state"], layer["code"], layer["backend"]) for layer in layers.values()] == [
        ("fused", None, "eager"),
        ("rank term fused", "hooks", "eager"),
        ("own forward", "dropout", None),
    ]
    assert layers["second"]["reason"] == "the base layer has hooks"
    assert [each["method"] for each in found["layers"]] == ["lora"] * 3
    assert found["totals"] == {"layers": 3, "fused": 1, "declined": 2, "deferred": 0, "expected": 0, "rank_term": 1}
    assert [type(layer["reason"]) for layer in found["layers"]] == [type(None), str, str]


def test_the_groups_are_those_of_now(seed: int) -> None:
    model = tiny_llama.llama("lora", seed, blocks=1)
    report = dk.accelerate(model)
    assert report.to_dict()["groups"] == []
    for _ in range(2):
        model(tiny_llama.tokens(seed, 1, 4))
    groups = report.to_dict()["groups"]
    assert [len(group) for group in groups] == [3, 2]
    assert groups == json.loads(json.dumps(groups))


def test_every_reason_of_a_model_has_a_code(seed: int) -> None:
    model = declined(seed)
    for layer in dk.accelerate(model).declined:
        assert layer.code in CODES
    with torch.device("meta"):
        meta = peft.get_peft_model(nn.Sequential(nn.Linear(3, 4)), peft.LoraConfig(target_modules=["0"]))
    assert [layer.code for layer in dk.accelerate(meta).declined] == ["meta-device"]


@pytest.mark.parametrize(
    ("backends", "end"),
    [
        (("triton", "triton"), " on the triton backend"),
        (("triton", "eager", "triton"), " on the backends triton (2), eager (1)"),
        ((None,), ""),
    ],
)
def test_the_first_line_names_the_backends(backends: tuple[str | None, ...], end: str) -> None:
    layers = tuple(LayerReport(f"layer{i}", "dora", None, backend=name) for i, name in enumerate(backends))
    count = len(layers)
    assert str(Report(layers)) == f"fused {count} of {count} adapter layers ({count} dora){end}"


def test_reports_pickled_before_there_were_codes() -> None:
    """Their attributes are those of a layer and a report then."""
    layer = LayerReport("layer", "lora", "the base layer has hooks", state=State.RANK_TERM)
    report = Report((layer,))
    layer.__dict__.pop("backend")
    report.__dict__.pop("proofs")
    found = pickle.loads(pickle.dumps(report))
    assert found.to_dict()["layers"][0]["code"] == "hooks"
    assert "rank term alone fused, 1: the base layer has hooks: layer" in str(found)


def test_the_documented_keys_are_there(seed: int) -> None:
    found = dk.accelerate(peft_models.model("lora", seed)).to_dict()
    text = str(reports.Report.to_dict.__doc__)
    assert all(f"`{key}`" in text for key in (*found, *found["layers"][0]))
