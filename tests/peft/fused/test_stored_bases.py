"""PEFT's layers on stored bases: fused, with PEFT's numbers, dequantised once each way."""

import pytest
import torch
from peft_models import assert_close, config, step
from stored_layers import adapted, dequantisations
from torch import Tensor

import delora_kernels as dk
from benchmarks.memory import kept_bytes

bnb = pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(3, 5, 32)


METHODS = ("lora", "rslora", "dora")


@pytest.mark.parametrize("form", ["nf4", "fp4-nested-bf16-storage", "torchao-int8", "torchao-float8", "hqq-4"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parity(form: str, method: str, dtype: torch.dtype, x: Tensor, seed: int) -> None:
    """Outputs and every gradient; float32 adapters."""
    made = adapted(form, method, seed, dtype=dtype)
    theirs = step(made, x.to(dtype))
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == 2
    assert_close(step(made, x.to(dtype)), theirs, dtype)
    assert dk.restore(made) == 2
    again = step(made, x.to(dtype))
    assert all(torch.equal(again[name], value) for name, value in theirs.items())


@pytest.mark.parametrize("form", ["nf4-nested", "torchao-int8", "hqq-4"])
@pytest.mark.parametrize("method", METHODS)
def test_autocast(form: str, method: str, x: Tensor, seed: int) -> None:
    """Float32 tokens, and a base and branch that multiply in bfloat16; the output in the library's
    dtype.
    """
    made = adapted(form, method, seed, dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        with dequantisations() as count:
            ours = step(made, x)
    assert len(count) == (4 if form == "nf4-nested" else 0)
    assert_close(ours, theirs, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_several_adapters_dropout_and_no_gradients(method: str, x: Tensor, seed: int) -> None:
    """Two stacked adapters; a dropout that is on; no gradient of x; inference."""
    made = adapted("nf4", method, seed, dropout_p=0.5)
    if method != "dora":
        made.add_adapter("other", config(method, r=2, target_modules=["first"]))
        made.base_model.set_adapter(["default", "other"])
    made.eval()
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)
    with torch.no_grad(), dequantisations() as count:
        torch.testing.assert_close(made(x), theirs["y"])
    assert len(count) == 2
    made.train()
    with dequantisations() as count:
        made(x).sum().backward()  # nobody wants dx of the first layer
    assert len(count) == 3
    assert not torch.equal(made(x), made(x))


@pytest.mark.parametrize("form", ["nf4", "hqq-4"])
def test_a_dora_among_several(form: str, x: Tensor, seed: int) -> None:
    """In PEFT's order; the weight is made dense for the norm and for each product."""
    made = adapted(form, "lora", seed)
    made.add_adapter("other", config("dora", r=2, target_modules=["first", "second"]))
    for order in (["default", "other"], ["other", "default"]):
        made.base_model.set_adapter(order)
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs)
        dk.restore(made)


@pytest.mark.parametrize("method", METHODS)
def test_one_dequantisation_each_way(method: str, seed: int) -> None:
    made = adapted("nf4", method, seed, dtype=torch.float32).base_model.model.first
    x = torch.randn(9, 32)
    dk.accelerate(made)
    with dequantisations() as count:
        made(x)
        assert len(count) == 1
        step(made, x)
    assert len(count) == 1 + 2


@pytest.mark.parametrize(("dtype", "of_dora"), [(torch.float32, 0.55), (torch.bfloat16, 0.35)])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_for_backward(method: str, dtype: torch.dtype, of_dora: float, seed: int) -> None:
    """[T, R], and for DoRA two vectors and one [T, N] in the compute dtype; PEFT's DoRA keeps two,
    and around a base of 16 bits two of float32 beside one of 16.
    """
    T, N, r = 64, 96, 4
    made = adapted("nf4", method, seed, width=N, r=r, dtype=dtype).base_model.model.first
    x = torch.randn(T, N, dtype=dtype).requires_grad_()
    made(x)
    known = [x, *made.parameters()]
    theirs = kept_bytes(lambda: made(x), known)
    dk.accelerate(made)
    ours = kept_bytes(lambda: made(x), known)
    assert ours == 4 * T * r + (0 if method != "dora" else T * N * dtype.itemsize + 2 * 4 * N)
    assert ours <= (of_dora if method == "dora" else 1) * theirs


def test_the_first_input_settles_the_compute_dtype(x: Tensor, seed: int) -> None:
    """As bitsandbytes does it; and the bias stays in its dtype."""
    made, plain = adapted("nf4", "lora", seed), adapted("nf4", "lora", seed)
    dk.accelerate(made)
    assert not made.base_model.model.first.base_layer.compute_type_is_set
    for dtype in (torch.bfloat16, torch.bfloat16):
        assert_close(step(made, x.to(dtype)), step(plain, x.to(dtype)), dtype)
    base = made.base_model.model.first.base_layer
    assert (base.compute_type_is_set, base.compute_dtype) == (True, torch.bfloat16)
    assert base.bias.dtype == torch.float32


def test_wide_tokens_are_left_to_pefts_branch(x: Tensor, seed: int) -> None:
    """Without autocast PEFT's branch sees them unrounded."""
    made = adapted("nf4", "lora", seed, dtype=torch.bfloat16)
    theirs = step(made, x)
    dk.accelerate(made)
    ours = step(made, x)
    assert_close(ours, theirs)
