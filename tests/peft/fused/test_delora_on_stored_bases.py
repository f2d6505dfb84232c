"""PEFT's DeLoRA on stored bases, after the one call that allows it."""

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.delora.model import DeloraModel
from peft_models import assert_close, config, step
from stored_layers import adapted, bare
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels import reference
from delora_kernels.bases.read import base_in

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


@pytest.fixture
def allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    """DeLoRA on stored bases, for this test."""
    monkeypatch.setattr(DeloraModel, "_create_new_module", staticmethod(DeloraModel._create_new_module))
    dk.allow_delora_on_stored_bases()


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.usefixtures("allowed")
def test_delora(form: str, x: Tensor, seed: int, tmp_path: Path) -> None:
    """PEFT's own forward, the fused one and the float64 formula; saved, loaded and exported."""
    made = adapted(form, "delora", seed, dtype=torch.float32)
    layer = made.base_model.model.first
    base: Any = base_in(layer.base_layer)
    W = base.dense(torch.float32).double()
    norm = layer.delora_w_norm["default"]
    torch.testing.assert_close(norm.double(), W.norm(dim=0))
    theirs = step(made, x)
    report = dk.accelerate(made, strict=True)
    assert [each.method for each in report.fused] == ["delora", "delora"]
    ours = step(made, x)
    assert_close(ours, theirs)
    A, B, lam = (each["default"].double() for each in (layer.delora_A, layer.delora_B, layer.delora_lambda))
    exact = reference.delora_linear(x.double(), W, A, B, lam, W.norm(dim=0), base.bias.double())
    torch.testing.assert_close(layer(x).double(), exact, rtol=0, atol=1e-5 * float(exact.abs().max()))
    made.save_pretrained(tmp_path / "adapter")
    dk.export_lora(made, tmp_path / "lora")
    again = peft.PeftModel.from_pretrained(bare(form, seed, dtype=torch.float32), tmp_path / "adapter")
    torch.testing.assert_close(again(x), ours["y"])
    if form == "nf4-nested":
        exported = peft.PeftModel.from_pretrained(bare(form, seed, dtype=torch.float32), tmp_path / "lora")
        torch.testing.assert_close(exported(x), ours["y"])
    with pytest.raises(ValueError, match="can't be merged into a .*: quantising W"):
        made.merge_adapter()
    assert dk.restore(made) == 2
    torch.testing.assert_close(made(x), ours["y"])


@pytest.mark.usefixtures("allowed")
def test_compiled_without_a_break(x: Tensor, seed: int) -> None:
    """Forward and backward in one graph each: y and every gradient."""
    made = adapted("nf4-nested", "delora", seed, dtype=torch.float32)
    dk.accelerate(made, strict=True)
    expected = step(made, x)
    torch._dynamo.reset()
    made.compile(fullgraph=True, backend="aot_eager")
    assert_close(step(made, x), expected)


@pytest.mark.usefixtures("allowed")
def test_delora_elsewhere_is_pefts_own(x: Tensor, seed: int) -> None:
    torch.manual_seed(seed)
    made = peft.get_peft_model(nn.Sequential(nn.Linear(32, 8)), config("delora", target_modules=["0"]))
    assert type(made.base_model.model[0]) is DeloraLinear
    lost = bare("nf4", seed)
    lost.first.quant_state = lost.first.weight.quant_state = None
    with pytest.raises(TypeError, match="DeLoRA needs the weight of its base layer, a Linear4bit, but its packed"):
        peft.get_peft_model(lost, config("delora", target_modules=["first"]))
