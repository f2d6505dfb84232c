"""Batches whose samples have adapters of their own (PEFT's adapter_names): PEFT's numbers."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import LoraLayer
from peft_models import assert_close, model
from peft_pairs import TARGETS, add
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import mixed_batch, stored_bases

NAMES = ["other", "__base__", "default", "other", "third", "default"]


def pair(seed: int, dtype: torch.dtype = torch.float64) -> tuple[Any, Any]:
    """Three adapters of different ranks and scales, one of them on two layers alone; the first
    model is accelerated.
    """
    both = []
    for _ in range(2):
        made = model("lora", seed, dtype=dtype)
        add(made, "other", "lora", r=5)
        add(made, "third", "rslora", seed=8, r=1, target_modules=["first", "third"])
        both.append(made.eval())
    dk.accelerate(both[0])
    return both[0], both[1]


def results(made: nn.Module, x: Tensor, names: list[str], train: bool = True) -> dict[str, Tensor]:
    made.zero_grad(set_to_none=True)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_(train and "lora_" in name)
    x = x.detach().requires_grad_(train)
    y = made(x, adapter_names=names)
    if not train:
        return {"y": y}
    y.double().square().sum().backward()
    grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None and p.grad.any()}
    return {"y": y.detach(), "x": x.grad} | grads


@pytest.fixture
def fused(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call that ran fused."""
    seen: list[int] = []
    run: Callable[..., Tensor] = mixed_batch._run
    monkeypatch.setattr(mixed_batch, "_run", lambda *a: seen.append(a[-1].shape[:-1].numel()) or run(*a))
    return seen


@pytest.mark.parametrize("train", [True, False])
@pytest.mark.parametrize("length", [1, 3, 40])
@pytest.mark.parametrize("names", [NAMES, sorted(NAMES), ["__base__"] * 6, ["other"] * 6], ids=str)
def test_pefts_numbers(names: list[str], length: int, train: bool, seed: int, fused: list[int]) -> None:
    """Short samples of one adapter are brought together, long ones run as they stand."""
    made, plain = pair(seed)
    x = torch.randn(6, length, 12, dtype=torch.float64)
    theirs = results(plain, x, names, train)
    assert_close(results(made, x, names, train), theirs, torch.float64)
    assert fused == [6 * length] * 3


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dtypes(dtype: torch.dtype, autocast: bool, seed: int, fused: list[int]) -> None:
    """float32 factors on a bfloat16 base too."""
    made, plain = pair(seed, dtype)
    x = torch.randn(6, 7, 12, dtype=dtype)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        theirs = results(plain, x, NAMES)
        assert_close(results(made, x, NAMES), theirs, torch.bfloat16 if autocast else dtype)
    assert len(fused) == 3


def test_two_dimensions(seed: int) -> None:
    made, plain = pair(seed)
    x = torch.randn(6, 12, dtype=torch.float64)
    assert_close(results(made, x, NAMES), results(plain, x, NAMES), torch.float64)


def _dropout_left_in_training(made: Any) -> None:
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.train()


LEFT: dict[str, tuple[dict[str, Any], Callable[[Any], object]]] = {
    "dropout": ({"dropout_p": 0.3}, _dropout_left_in_training),
    "lora_bias": ({"lora_bias": True}, lambda made: None),
    "disabled": ({}, lambda made: made.base_model.disable_adapter_layers()),
    "hooked": ({}, lambda made: made.base_model.model.first.lora_A["default"].register_forward_hook(lambda *_: None)),
}


@pytest.mark.parametrize("case", LEFT)
def test_left_to_peft(case: str, seed: int, fused: list[int]) -> None:
    options, change = LEFT[case]
    both = [model("lora", seed, **{"target_modules": ["first"]} | options) for _ in range(2)]
    for made in both:
        change(made.eval())
    dk.accelerate(both[0])
    names, x = ["default", "__base__"], torch.randn(2, 3, 12)
    outputs = []
    for made in both:
        torch.manual_seed(seed)
        outputs.append(made(x, adapter_names=names) if case != "disabled" else made.base_model.model.first(x))
    assert torch.equal(*outputs)
    assert not fused


def test_pefts_errors(seed: int) -> None:
    """What PEFT refuses is refused in its words."""
    made, _ = pair(seed)
    layer, x = made.base_model.model.first, torch.randn(6, 3, 12, dtype=torch.float64)
    with pytest.raises(ValueError, match="Length of `adapter_names`"):
        layer(x, adapter_names=["default"])
    made.merge_adapter(["default"])
    with pytest.raises(ValueError, match="merged adapters"):
        layer(x, adapter_names=NAMES)
    dora = model("dora", seed, target_modules=TARGETS[:1])
    dk.accelerate(dora)
    with pytest.raises(ValueError, match="DoRA"):
        dora.base_model.model.first(x.float(), adapter_names=["default"] * 6)


def test_the_call_after_it_is_an_ordinary_one(seed: int) -> None:
    made, plain = pair(seed)
    x = torch.randn(6, 3, 12, dtype=torch.float64)
    results(made, x, NAMES)
    torch.testing.assert_close(made(x), plain(x), rtol=1e-12, atol=1e-12)


def test_an_adapter_called_base_is_nobodys(seed: int) -> None:
    """As PEFT takes it: a sample of "__base__" has none, whatever adapters there are."""
    made, _ = pair(seed)
    add(made, "__base__", "lora")
    layer, x = made.base_model.model.first, torch.randn(2, 3, 12, dtype=torch.float64)
    assert torch.equal(layer(x, adapter_names=["__base__"] * 2), layer.base_layer(x))


def test_a_replaced_method_runs(seed: int, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    made, _ = pair(seed)
    layer, x = made.base_model.model.first, torch.randn(6, 3, 12, dtype=torch.float64)
    monkeypatch.setattr(LoraLayer, "_mixed_batch_forward", lambda *_, **__: x)
    assert layer(x, adapter_names=NAMES) is x
    assert not fused


def test_an_untested_peft_runs_its_own(seed: int, fused: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """The check of an untested version compares single adapters alone."""
    monkeypatch.setattr(stored_bases.versions, "status", lambda *_: "newer")
    monkeypatch.setattr(stored_bases.versions, "in_words", lambda *_: "newer than the tested ones")
    made, plain = pair(seed)
    x = torch.randn(6, 3, 12, dtype=torch.float64)
    assert torch.equal(made(x, adapter_names=NAMES), plain(x, adapter_names=NAMES))
    assert not fused
    report = dk.accelerate(model("lora", seed, lora_bias=True))
    assert {layer.code for layer in report.layers} == {"peft-version"}


@pytest.mark.parametrize("length", [1, 40])
def test_batched_gradients(length: int, seed: int) -> None:
    """is_grads_batched=True, of short samples and long ones."""
    made, plain = pair(seed)
    found = []
    for both in (made, plain):
        for name, parameter in both.named_parameters():
            parameter.requires_grad_("lora_" in name)
        x = torch.randn(6, length, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        y = both(x.requires_grad_(), adapter_names=NAMES).sum((1, 2))
        layer = both.base_model.model.first
        leaves = [x, layer.lora_A["other"].weight, layer.lora_B["default"].weight, layer.lora_A["third"].weight]
        found.append(torch.autograd.grad(y, leaves, torch.eye(6, dtype=torch.float64), is_grads_batched=True))
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)
