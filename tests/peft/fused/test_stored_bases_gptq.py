"""PEFT's LoRA on GPTQModel's linears: fused, with PEFT's numbers and those of the dense weight."""

from typing import Any

import peft
import pytest
import torch
from gptq_linear import gptq
from peft.tuners.lora.gptq import GPTQLoraLinear
from peft_models import assert_close, step
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.bases.gptqmodel_linear import GptqmodelBase
from delora_kernels.bases.read import base_in

N, K = 96, 64


@pytest.fixture(params=[False, True], ids=["stand-in", "library"])
def own(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


def layer(base: nn.Module, adapters: int = 1) -> Any:
    """PEFT's layer around it, whose dispatch asks for the library."""
    config = peft.LoraConfig(r=4, init_lora_weights=False)
    made = GPTQLoraLinear(base, "first", config, r=4, lora_alpha=8)
    if adapters == 2:
        made.update_layer("second", 2, lora_alpha=6, config=config)
        made.set_adapter(["first", "second"])
    for parameter in made.parameters():
        parameter.data = parameter.data.float()  # as get_peft_model() leaves them
    return made


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("shuffled", [False, True])
def test_the_form_reads_what_it_multiplies_by(bits: int, shuffled: bool, own: bool, seed: int) -> None:
    torch.manual_seed(seed)
    for training in (True, False):
        module = gptq(N, K, bits=bits, shuffled=shuffled, own=own).train(training)
        base = base_in(module)
        assert isinstance(base, GptqmodelBase), base
        W = base.dense(torch.float32)
        assert W.shape == (N, K)
        exact = module(torch.eye(K)) - module.bias.float()
        torch.testing.assert_close(W.t(), exact, rtol=0, atol=1e-6 * float(module.bias.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("adapters", [1, 2])
def test_parity(dtype: torch.dtype, adapters: int, own: bool, seed: int) -> None:
    """Outputs and every gradient of float32 adapters; under autocast too; restored."""
    torch.manual_seed(seed)
    made = layer(gptq(N, K, dtype=torch.bfloat16, own=own), adapters)
    x = torch.randn(3, 5, K).to(dtype)
    theirs = step(made, x)
    report = dk.accelerate(made, strict=True)
    assert [each.state for each in report.layers] == ["fused"]
    assert_close(step(made, x), theirs, dtype)
    with torch.autocast("cpu", torch.bfloat16):
        ours = step(made, x)
        assert dk.restore(made) == 1
        assert_close(ours, step(made, x), torch.bfloat16)
    again = step(made, x)
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


def test_bits_and_groups_layer_by_layer(own: bool, seed: int) -> None:
    """A model whose `dynamic` settings give its layers other bits and group sizes: each is compared
    with its own module, by itself, and computes as that does.
    """
    torch.manual_seed(seed)
    kinds = ((4, 16), (8, 16), (4, 32), (2, 32))
    model = nn.Sequential(*[layer(gptq(K, K, bits=bits, group=group, own=own)) for bits, group in kinds])
    x = torch.randn(7, K)
    theirs = step(model, x)
    report = dk.accelerate(model, strict=True)
    assert [each.state for each in report.layers] == ["fused"] * len(kinds)
    assert_close(step(model, x), theirs, torch.float32)
    bases = [base_in(each.base_layer) for each in model]
    assert len({base.key for base in bases}) == len(kinds)
    for base, each in zip(bases, model, strict=True):
        exact = each.base_layer(torch.eye(K)) - each.base_layer.bias.float()
        limit = 1e-6 * float(each.base_layer.bias.abs().max())
        torch.testing.assert_close(base.dense(torch.float32).t(), exact, rtol=0, atol=limit)


def _rotates(base: Any) -> None:
    own = type(base).forward
    kind = type("TorchLinear", (type(base),), {"forward": lambda self, x: own(self, x.flip(-1))})
    kind.__module__ = type(base).__module__
    base.__class__ = kind


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda base: setattr(base, "adapter", lambda x, out: out + 1), "an adapter of GPTQModel's own"),
        (lambda base: setattr(base, "g_idx", base.g_idx.repeat(2)), "its g_idx has 128 elements for 64 in-features"),
        (lambda base: base.register_forward_hook(lambda *_: None), "the base layer has hooks"),
        (_rotates, "its forward is not x Wᵀ + bias of its dense form"),
    ],
)
def test_what_computes_more_runs_itself(change: Any, reason: str, seed: int) -> None:
    torch.manual_seed(seed)
    made = layer(gptq(N, K))
    x: Tensor = torch.randn(3, K)
    change(made.base_layer)
    report = dk.accelerate(made)
    assert [each.state for each in report.layers] == ["rank term fused"]
    assert reason in str(report.layers[0].reason)
    if "g_idx" not in reason:
        ours = step(made, x)
        dk.restore(made)
        assert_close(ours, step(made, x))


def test_another_kernel_and_dora(seed: int) -> None:
    """As can_accelerate() says before loading."""
    torch.manual_seed(seed)
    base = gptq(N, K)
    other = type("MarlinLinear", (type(base),), {})
    other.__module__ = "gptqmodel.nn_modules.qlinear.marlin"
    base.__class__ = other
    assert [each.state for each in dk.accelerate(layer(base)).layers] == ["rank term fused"]
    with pytest.raises(ValueError, match="does not support DoRA"):
        GPTQLoraLinear(gptq(N, K), "first", peft.LoraConfig(r=4, use_dora=True), r=4)
