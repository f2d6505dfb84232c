"""Stored bases that are no longer what they were stored as, or that somebody has changed: a layer
never runs on a wrong weight, and says why.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft_models import assert_close, step
from stored_layers import adapted, dequantisations
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, Shard

import delora_kernels as dk

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


def test_a_lost_state_that_the_module_has_kept_is_put_back(x: Tensor, seed: int) -> None:
    made = adapted("nf4", "lora", seed)
    dk.accelerate(made)
    expected = step(made, x)
    base = made.base_model.model.first.base_layer
    base.weight.quant_state = None
    assert_close(step(made, x), expected)
    assert base.weight.quant_state is base.quant_state


def _loses_its_state(base: Any) -> None:
    base.quant_state = base.weight.quant_state = None


def _is_a_shard(base: Any) -> None:
    base.weight.data = base.weight.data[: base.weight.numel() // 2]


def _is_cast(base: Any) -> None:
    base.weight.data = base.weight.data.to(torch.float16)


def _is_packed(base: Any) -> None:
    base.weight.quant_state.packing_format_for_cpu = True


@pytest.mark.parametrize(
    ("breakage", "form", "reason"),
    [
        (_loses_its_state, "nf4", "its packed weight has no quant_state"),
        (_is_a_shard, "nf4", "its packed weight has 256 bytes where its \\[32, 32\\] weights take 512"),
        (_is_cast, "fp4-nested-bf16-storage", "was stored as torch.bfloat16 and is torch.float16 now"),
        (_is_packed, "nf4", "packed for inference on this CPU"),
    ],
)
def test_broken_bases_are_refused_with_the_reason(breakage: Any, form: str, reason: str, x: Tensor, seed: int) -> None:
    """Before a wrong number: by the report, by strict=True, and at a call."""
    made = adapted(form, "lora", seed)
    dk.accelerate(made, strict=True)
    breakage(made.base_model.model.first.base_layer)
    report = dk.accelerate(made)
    assert [layer.fused for layer in report.layers] == [False, True]
    with pytest.raises(RuntimeError, match=reason):
        dk.accelerate(made, strict=True)
    own = "quant_state is required" if breakage is _loses_its_state else reason  # bitsandbytes itself refuses
    with pytest.raises((RuntimeError, ValueError), match=own):
        made(x.requires_grad_())


def test_a_weight_packed_for_inference_still_infers(x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By bitsandbytes' own forward."""
    made = adapted("nf4", "lora", seed).eval()
    dk.accelerate(made)
    base = made.base_model.model.first.base_layer
    _is_packed(base)
    monkeypatch.setattr(type(base), "forward", lambda self, x: x)
    with torch.no_grad():
        assert made.base_model.model.first(x).shape == x.shape


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base, patch: base.register_forward_hook(lambda *_: None), "the base layer has hooks"),
        (lambda base, patch: setattr(base, "forward", lambda x: x), "the base layer has a forward of its own"),
        (
            lambda base, patch: patch.setattr(bnb.nn.Linear4bit, "forward", lambda self, x: x),
            "the forward of its base layer's class has been replaced",
        ),
    ],
)
def test_who_changes_the_base_gets_it(
    change: Any, reason: str, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = adapted("nf4", "lora", seed)
    dk.accelerate(made)
    change(made.base_model.model.first.base_layer, monkeypatch)
    assert reason in str(dk.accelerate(made))
    with dequantisations() as count:
        made(x)
    assert len(count) < 2


def test_a_sharded_packed_weight_is_named(x: Tensor, seed: int, tmp_path: Path) -> None:
    """As FSDP2 leaves it: its own forward raises too, for the state is lost."""
    made = adapted("nf4", "lora", seed)
    dk.accelerate(made, strict=True)
    base = made.base_model.model.first.base_layer
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        mesh = torch.distributed.init_device_mesh("cpu", (1,))
        shard = DTensor.from_local(base.weight.data, mesh, [Shard(0)])
        base.weight, base.quant_state = nn.Parameter(shard, requires_grad=False), None
        report = dk.accelerate(made)
        assert [layer.fused for layer in report.layers] == [False, True]
        assert "its packed weight is a DTensor, not bitsandbytes' Params4bit" in str(report.layers[0].reason)
        with pytest.raises((RuntimeError, AssertionError, ValueError)):
            made(x.requires_grad_())
    finally:
        torch.distributed.destroy_process_group()
