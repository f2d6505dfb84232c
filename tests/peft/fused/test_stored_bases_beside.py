"""Stored bases that round their tokens, or run a forward of their own: PEFT's numbers, and the rank
term alone fused.
"""

from typing import Any

import peft
import pytest
import torch
from peft_models import assert_close, config, step
from torch import Tensor, nn

import delora_kernels as dk


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


@pytest.mark.parametrize("threshold", [0.0, 6.0])
def test_eight_bit_bases_run_themselves(threshold: float, x: Tensor, seed: int) -> None:
    """LLM.int8() rounds its tokens: the rank term alone is fused."""
    bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    torch.manual_seed(seed)
    made = nn.Module()
    linear = bnb.nn.Linear8bitLt(32, 24, has_fp16_weights=False, threshold=threshold)
    linear.weight = bnb.nn.Int8Params(torch.randn(24, 32), requires_grad=False, has_fp16_weights=False)
    made.first, made.is_loaded_in_8bit = linear.to("cpu"), True
    peft.inject_adapter_in_model(config("lora", target_modules=["first"]), made)
    layer = made.first
    layer.base_layer.bias.requires_grad_(False)
    theirs = step(layer, x)
    report = dk.accelerate(made)
    assert [each.state for each in report.layers] == ["rank term fused"]
    assert_close(step(layer, x), theirs)


def same_as_peft(base: nn.Module, x: Tensor, reason: str) -> None:
    """PEFT's output and gradients of LoRA on `base`, its rank term fused, for `reason`."""
    made = peft.get_peft_model(nn.Sequential(base), config("lora", target_modules=["0"]))
    theirs = step(made, x)
    report = dk.accelerate(made)
    assert [(each.state, each.reason) for each in report.layers] == [("rank term fused", reason)]
    assert_close(step(made, x), theirs)


@pytest.mark.parametrize("scheme", ["W4A16", "W8A8", "FP8_DYNAMIC"])
def test_compressed_tensors(scheme: str, x: Tensor, seed: int) -> None:
    """Its linears are torch's, with a forward of their own that rounds weights and tokens."""
    quantization = pytest.importorskip(
        "compressed_tensors.quantization", reason="needs compressed-tensors: pip install compressed-tensors"
    )
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(128, 24)).requires_grad_(False)
    groups = {"all": quantization.preset_name_to_scheme(scheme, ["Linear"])}
    quantization.apply_quantization_config(model, quantization.QuantizationConfig(config_groups=groups))
    for name, value in model[0].named_parameters():
        if "scale" in name:
            value.data.fill_(0.05)
        elif "zero_point" in name:
            value.data.zero_()
    wide = torch.randn(3, 5, 128)
    plain = nn.functional.linear(wide, model[0].weight, model[0].bias)
    assert not torch.allclose(model(wide), plain, atol=1e-3)  # it does round
    same_as_peft(model[0], wide, "the base layer has a forward of its own")


def test_transformers_fine_grained_fp8(x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its kernel, which needs a GPU, replaced by the formula: tokens rounded to float8."""
    finegrained_fp8 = pytest.importorskip("transformers.integrations.finegrained_fp8")
    if not hasattr(finegrained_fp8, "fp8_linear"):
        pytest.skip("this Transformers has no fp8_linear")

    def fp8_linear(x: Tensor, weight: Tensor, scale: Tensor, block: Any, bias: Any, *_: Any) -> Tensor:
        largest = x.abs().amax(-1, keepdim=True) / torch.finfo(torch.float8_e4m3fn).max
        rounded = (x / largest).to(torch.float8_e4m3fn).to(x.dtype) * largest
        dense = weight.to(x.dtype) * scale.repeat_interleave(block[0], 0).repeat_interleave(block[1], 1)
        return nn.functional.linear(rounded, dense, bias)

    monkeypatch.setattr(finegrained_fp8, "fp8_linear", fp8_linear)
    torch.manual_seed(seed)
    base = finegrained_fp8.FP8Linear(32, 16, block_size=(8, 8))
    base.weight.data = torch.randn(16, 32).to(torch.float8_e4m3fn)
    base.weight_scale_inv.data = torch.rand(2, 4)
    dense = base.weight.data.float() * base.weight_scale_inv.repeat_interleave(8, 0).repeat_interleave(8, 1)
    assert not torch.allclose(base(x), nn.functional.linear(x, dense, base.bias), atol=1e-3)  # it does round
    kind = f"{finegrained_fp8.__name__}.FP8Linear"
    same_as_peft(base.requires_grad_(False), x, f"the base layer is {kind}, not nn.Linear or Transformers' Conv1D")
