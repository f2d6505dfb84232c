"""The straight way is taken by the common call, and gives what plan.py's gives: numbers, what is
kept, backward passes out of the ordinary.
"""

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from straight_layers import METHODS, K, T, judged_twice, layer_of, outcome, same
from torch import Tensor, nn

from delora_kernels.autograd import low_rank
from delora_kernels.integrations.peft.fused import straight


@pytest.fixture
def x(seed: int) -> Tensor:
    return torch.randn(2, T // 2, K, dtype=torch.float64, generator=torch.Generator().manual_seed(seed + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(T, K), (2, 3, K), (1, 1, 1, K), (0, K)])
@pytest.mark.parametrize("method", METHODS)
def test_the_common_call_takes_it(
    method: str,
    shape: tuple[int, ...],
    dtype: torch.dtype,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed, dtype)
    x = torch.randn(shape, dtype=dtype)
    same(*judged_twice(layer, x, monkeypatch))
    assert taken == [f"{method}_linear"]
    for context in (torch.no_grad, torch.inference_mode):
        same(*judged_twice(layer, x, monkeypatch, context))
    assert len(taken) == 3
    layer.eval()
    same(*judged_twice(layer, x, monkeypatch))
    layer.set_adapter(["other"])
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 5


def _changed_scaling(layer: Any) -> None:
    layer.scaling["default"] *= 3


def _data_replaced(layer: Any) -> None:
    for parameter in layer.parameters():
        parameter.data = parameter.data.flip(0) * 2


def _weight_transposed(layer: Any) -> None:
    weight = layer.base_layer.weight
    weight.data = weight.data.t().clone().t()


def _parameters_replaced(layer: Any) -> None:
    for module in list(layer.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[name] = nn.Parameter(parameter.detach() * 2, parameter.requires_grad)


STAYS: dict[str, Callable[[Any], Any]] = {
    "data replaced": _data_replaced,
    "parameters replaced": _parameters_replaced,
    "written in place": lambda layer: [p.data.mul_(2) for p in layer.parameters()],
    "transposed strides": lambda layer: setattr(
        layer.base_layer.weight, "data", layer.base_layer.weight.data.t().clone().t()
    ),
    "no bias": lambda layer: setattr(layer.base_layer, "bias", None),
    "merged and back": lambda layer: (layer.merge(), layer.unmerge()),
    "switched and back": lambda layer: (layer.set_adapter(["other"]), layer.set_adapter(["default"])),
}


@pytest.mark.parametrize("change", STAYS.values(), ids=STAYS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_new_numbers_are_seen(
    method: str,
    change: Callable[[Any], Any],
    x: Tensor,
    seed: int,
    taken: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    layer = layer_of(method, seed)
    outcome(layer, x)
    change(layer)
    if method != "delora":
        _changed_scaling(layer)
    same(*judged_twice(layer, x, monkeypatch))
    assert len(taken) == 2


@pytest.mark.parametrize("method", METHODS)
def test_nothing_is_kept_on_the_layer(method: str, x: Tensor, seed: int, taken: list[str]) -> None:
    layer = layer_of(method, seed)
    before = set(layer.__dict__)
    expected = outcome(layer, x)
    assert set(layer.__dict__) == before
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        same(outcome(twin, x), expected)
    assert len(taken) == 3


@pytest.mark.parametrize("method", METHODS)
def test_extraordinary_backward_passes(
    method: str, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Autocast around backward alone, batched gradients, a second derivative: as without it."""
    layer = layer_of(method, seed)
    trained = [p for p in layer.parameters() if p.requires_grad]

    def results() -> list[Any]:
        given = x.clone().requires_grad_()
        found: list[Any] = []
        y = layer(given)
        dy = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y)
        with torch.autocast("cpu", torch.bfloat16):
            found += torch.autograd.grad(y, [given, *trained], dy, retain_graph=True)
        batch = torch.stack([dy, 2 * dy])
        found += torch.autograd.grad(y, [given, *trained], batch, is_grads_batched=True, retain_graph=True)
        grads = torch.autograd.grad(y, [given, *trained], dy, create_graph=True)
        found += [grad.detach() for grad in grads]
        for grad in grads:
            with pytest.raises(RuntimeError) as raised:
                grad.square().sum().backward(retain_graph=True)
            found.append(str(raised.value))
        return found

    ours = results()
    monkeypatch.setattr(straight, "enabled", False)
    theirs = results()
    assert len(taken) == 1
    same(dict(enumerate(ours)), dict(enumerate(theirs)))  # type: ignore[arg-type]


@pytest.mark.parametrize("needs_dx", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_keeps_what_the_stages_keep(
    method: str, needs_dx: bool, x: Tensor, seed: int, taken: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer's own tensors are the same, and as many bytes beside them."""
    layer = layer_of(method, seed)
    owned = {p.data_ptr(): name for name, p in (*layer.named_parameters(), *layer.named_buffers())}

    def kept() -> tuple[set[str], int]:
        packed: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
            layer(x.clone().requires_grad_(needs_dx))
        others = {t.data_ptr(): t.nbytes for t in packed if t.data_ptr() not in owned}
        return {owned[t.data_ptr()] for t in packed if t.data_ptr() in owned}, sum(others.values())

    ours = kept()
    monkeypatch.setattr(straight, "enabled", False)
    monkeypatch.setattr(low_rank, "ops_replaced", lambda: True)
    assert ours == kept()
    assert len(taken) == 1


@pytest.mark.parametrize("method", METHODS)
def test_consumers_may_write_into_the_output(method: str, x: Tensor, seed: int, taken: list[str]) -> None:
    layer = layer_of(method, seed)
    for given in (x, x[0]):
        once, twice = given.clone().requires_grad_(), given.clone().requires_grad_()
        (layer(once).relu_() * 3).sum().backward()
        (layer(twice).relu() * 3).sum().backward()
        assert torch.equal(once.grad, twice.grad)
    assert len(taken) == 4
