"""Calls that a fused layer leaves to PEFT: a replaced class forward, inputs that are not strided, odd numbers."""

from typing import Any

import pytest
import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft_models import model
from torch import Tensor

import delora_kernels as dk


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 12, dtype=torch.float64)


def first(made: Any) -> Any:
    return made.base_model.model.first


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_a_forward_that_others_put_into_pefts_class(
    method: str, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = LoraLinear if method == "lora" else DeloraLinear
    right = kind.forward
    made = model(method, seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    monkeypatch.setattr(kind, "forward", lambda self, x, *args, **kwargs: right(self, x, *args, **kwargs) + 100)
    layer = first(made)
    y = layer(x)
    assert {report.reason for report in dk.accelerate(made).layers} == {
        f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}.forward has been replaced"
    }
    dk.restore(made)
    assert torch.equal(y, layer(x))
    monkeypatch.undo()
    torch.testing.assert_close(y - 100, layer(x))


@pytest.mark.parametrize("method", ["lora", "delora"])
def test_inputs_that_are_not_strided(method: str, seed: int) -> None:
    made = model(method, seed)
    layer, x = first(made), torch.randn(3, 12)
    inputs = [x.to_sparse(), torch.nested.nested_tensor([x, x[:2]])]
    theirs = [_result(layer, one) for one in inputs]
    dk.accelerate(made, strict=True)
    assert [_result(layer, one) for one in inputs] == theirs


def _result(layer: Any, x: Tensor) -> Any:
    try:
        y = layer(x)
    except (RuntimeError, TypeError) as error:
        return type(error)
    return [part.tolist() for part in y.unbind()] if y.is_nested else y.tolist()


def test_numbers_that_are_not_finite_or_train(x: Tensor, seed: int) -> None:
    made = model("lora", seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    first(made).scaling["default"] = float("nan")
    assert first(made)(x).isnan().all()
    made = model("delora", seed, dtype=torch.float64)
    dk.accelerate(made, strict=True)
    first(made).delora_w_norm["default"].requires_grad_()
    assert [layer.reason for layer in dk.accelerate(made).declined] == ["its delora_w_norm requires a gradient"]
    first(made)(x).sum().backward()
    assert first(made).delora_w_norm["default"].grad.abs().sum() > 0
