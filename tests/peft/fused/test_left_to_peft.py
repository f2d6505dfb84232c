"""Calls that a fused layer leaves to PEFT: replaced methods of classes, odd layouts and dtypes, odd
numbers.
"""

import io
from typing import Any

import peft
import pytest
import torch
from fused_count import counted
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.dora import DoraLinearLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraLinearVariant
from peft_models import config, model
from peft_pairs import add, check_same, pair, step
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

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


REPLACED: list[tuple[str, type, str, int]] = [
    ("lora", nn.Linear, "forward", 0),  # lora_A and lora_B of the Conv1D
    ("dora", nn.Linear, "forward", 0),
    ("delora", nn.Linear, "forward", 0),
    ("lora", Conv1D, "forward", 2),
    ("lora", nn.Dropout, "forward", 0),
    ("delora", nn.Dropout, "forward", 0),
    ("dora", DoraLinearVariant, "forward", 0),
    ("dora", DoraLinearLayer, "forward", 0),
    ("dora", DoraLinearLayer, "get_weight_norm", 0),
]


@pytest.mark.parametrize(("method", "kind", "name", "fused"), REPLACED)
def test_methods_that_others_put_into_what_peft_calls(
    method: str, kind: Any, name: str, fused: int, x: Tensor, seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PEFT's forward runs, and with it the method in the place of the one that is fused."""
    dropout_p = 0.5 if kind is nn.Dropout else 0.0
    made, plain = (model(method, seed, dropout_p, dtype=torch.float64).eval() for _ in range(2))
    dk.accelerate(made, strict=True)
    right = getattr(kind, name)
    doubled: Any = lambda *args, **kwargs: 2 * right(*args, **kwargs)  # noqa: E731
    if kind is nn.Dropout:
        doubled = lambda self, x: 2 * x  # noqa: E731
    monkeypatch.setattr(kind, name, staticmethod(doubled) if kind is DoraLinearVariant else doubled)
    with counted() as passes:
        y = made(x)
    torch.testing.assert_close(y, plain(x), rtol=1e-12, atol=1e-12)
    assert len(passes) == fused
    reasons = {report.reason for report in dk.accelerate(made).layers}
    assert reasons - {None} == {
        f"{kind.__module__.removeprefix('peft.tuners.')}.{kind.__name__}.{name} has been replaced"
    }
    monkeypatch.undo()
    with counted() as passes:
        made(x)
    assert len(passes) == 3


@pytest.mark.parametrize("layout", [torch.sparse_coo, torch.sparse_csr])
@pytest.mark.parametrize("method", ["lora", "delora"])
def test_base_weights_that_are_not_dense(method: str, layout: torch.layout, x: Tensor, seed: int) -> None:
    made, plain = (model(method, seed, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    for both in (made, plain):
        base = first(both).base_layer
        base.weight = nn.Parameter(base.weight.detach().to_sparse(layout=layout), requires_grad=False)
    check_same(step(made, x), step(plain, x))
    assert dk.accelerate(made).layers[0].reason == f"the base weight has layout {layout}"


@pytest.mark.parametrize("dtype", [torch.float64, torch.int64])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_inputs_that_autocast_does_not_cast(method: str, dtype: torch.dtype, seed: int) -> None:
    """PEFT's own error."""
    made = model(method, seed)
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            with pytest.raises(RuntimeError, match="must have the same dtype"):
                first(made)(torch.ones(3, 12, dtype=dtype))
            dk.accelerate(made, strict=True)


def test_dropout_that_writes_into_its_input(x: Tensor, seed: int) -> None:
    made, plain = (model("lora", seed, dropout_p=0.5, dtype=torch.float64) for _ in range(2))
    dk.accelerate(made, strict=True)
    results = []
    for both in (made, plain):
        first(both).lora_dropout["default"].inplace = True
        torch.manual_seed(seed)
        results.append((first(both)(given := x.clone()), given))
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    assert dk.accelerate(made).layers[0].reason == "its dropout writes into its input"


def test_dora_norms_along_the_other_axis(x: Tensor, seed: int) -> None:
    """A square nn.Linear whose magnitude takes it for a Conv1D."""
    torch.manual_seed(seed)
    made = peft.get_peft_model(nn.Sequential(nn.Linear(12, 12)).double(), config("dora", target_modules=["0"]))
    layer: Any = made.base_model.model[0]
    layer.lora_magnitude_vector["default"].fan_in_fan_out = True
    expected = made(x)
    (declined,) = dk.accelerate(made).declined
    assert declined.reason == "its fan_in_fan_out is not that of its base"
    assert torch.equal(made(x), expected)


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


@pytest.mark.filterwarnings("ignore::torch.jit.TracerWarning", "ignore:.*deprecated:DeprecationWarning")
@pytest.mark.parametrize("active", [["default"], ["default", "other"]])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_traces_are_pefts(method: str, active: list[str], x: Tensor, seed: int) -> None:
    """They can be saved, and hold the operations that PEFT's hold: none of this library."""
    loaded, kinds = [], []
    for made in pair(method, seed):
        add(made, "other", method)
        made.base_model.set_adapter(active)
        traced = torch.jit.trace(made.eval().base_model.model, x, check_trace=False)
        torch.jit.save(traced, buffer := io.BytesIO())
        loaded.append(torch.jit.load(io.BytesIO(buffer.getvalue())))
        kinds.append([node.kind() for node in traced.inlined_graph.nodes()])
    assert kinds[0] == kinds[1]
    check_same({"y": loaded[0](x + 1).detach()}, {"y": made(x + 1).detach()})


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
