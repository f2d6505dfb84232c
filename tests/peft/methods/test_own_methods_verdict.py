"""What the library's own layers say of themselves is what they do: report, strict, log, and the
call itself.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from own_methods import CONFIGS, MERGEABLE, K, N, adapted, layers
from torch import nn
from torch.nn.utils import parametrize

import delora_kernels as dk
from delora_kernels.integrations.peft import verdict
from delora_kernels.integrations.peft.verdict import State

methods = pytest.mark.parametrize("method", CONFIGS)
LESS = {"goat": State.RANK_TERM, "goat_of_one": State.RANK_TERM, "ether": State.OWN_FORWARD}
LESS["ether_plus"] = State.OWN_FORWARD


class Subclass(nn.Linear):
    pass


class Tagged(torch.Tensor):
    """A tensor that is more than memory, as those of quantisers are."""


def hooked(model: Any) -> None:
    layers(model)[0].base_layer.register_forward_hook(lambda *_: None)


def parametrized(model: Any) -> None:
    parametrize.register_parametrization(layers(model)[0].base_layer, "weight", nn.Identity())


def subclassed(model: Any) -> None:
    layers(model)[0].base_layer.__class__ = Subclass


def of_another_tensor(model: Any) -> None:
    base = layers(model)[0].base_layer
    base.weight = nn.Parameter(base.weight.detach().as_subclass(Tagged), requires_grad=False)


def patched(model: Any) -> None:
    base = layers(model)[0].base_layer
    base.forward = lambda x: nn.functional.linear(x, base.weight, base.bias)


def two_adapters(model: Any) -> None:
    kind = next(iter(model.peft_config.values()))
    model.add_adapter("second", type(kind)(**{**kind.to_dict(), "peft_type": None, "inference_mode": False}))
    model.base_model.set_adapter(["default", "second"])
    model.double()


SITUATIONS: dict[str, tuple[Callable[[Any], None], str]] = {
    "hooked": (hooked, "the base layer has hooks"),
    "parametrized": (parametrized, "Parametrized"),
    "subclass": (subclassed, "Subclass, not nn.Linear"),
    "another tensor": (of_another_tensor, "the base weight is a Tagged"),
    "patched": (patched, "the base layer has a forward of its own"),
    "two adapters": (two_adapters, "2 active adapters"),
}


@pytest.fixture(autouse=True)
def _forget_what_was_logged() -> Iterator[None]:
    verdict._logged.clear()
    yield
    verdict._logged.clear()


@methods
def test_a_plain_layer_is_fused(method: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    model = adapted(method, seed)
    with caplog.at_level(logging.WARNING):
        report = dk.accelerate(model, strict=True)
        model(torch.randn(3, K, dtype=torch.float64))
    assert report.fused == report.layers
    assert [layer.state for layer in report.layers] == [State.FUSED]
    assert not caplog.records


@methods
@pytest.mark.parametrize("situation", SITUATIONS)
def test_less_is_said_where_less_is_done(
    method: str, situation: str, seed: int, caplog: pytest.LogCaptureFixture
) -> None:
    change, reason = SITUATIONS[situation]
    model, plain = adapted(method, seed), adapted(method, seed)
    change(model)
    report = dk.accelerate(model)
    (said,) = report.declined
    assert (report.fused, said.fused, said.state) == ((), False, LESS[method])
    assert reason in str(said.reason)
    assert reason in str(report)
    with pytest.raises(RuntimeError, match="strict=True"):
        dk.accelerate(model, strict=True)
    x = torch.randn(2, 3, K, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        y, *_ = (model(x) for _ in range(3))
    logged = [record.getMessage() for record in caplog.records if record.name == verdict.__name__]
    assert len(logged) == 1
    assert logged[0].endswith(str(said.reason))
    if situation != "two adapters":
        torch.testing.assert_close(torch.Tensor(y.detach()), plain(x).detach(), rtol=0, atol=1e-12)


@pytest.mark.parametrize("method", MERGEABLE)
def test_merged_and_disabled_are_no_fused_layers(method: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    model, x = adapted(method, seed), torch.randn(3, K, dtype=torch.float64)
    with caplog.at_level(logging.WARNING):
        with model.disable_adapter():
            assert dk.accelerate(model).layers[0].reason == verdict.DISABLED
            model(x)
        model.merge_adapter()
        assert dk.accelerate(model).layers[0].reason == verdict.MERGED
        model(x)
    assert dk.accelerate(model).layers[0].state == State.OWN_FORWARD
    assert not [record for record in caplog.records if record.name == verdict.__name__]


@methods
def test_a_call_with_arguments_is_logged(method: str, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    model: Any = adapted(method, seed)
    layer = layers(model)[0]
    layer.base_layer.forward = lambda x, extra=None: nn.functional.linear(x, layer.base_layer.weight)
    with caplog.at_level(logging.WARNING):
        layer(torch.randn(3, K, dtype=torch.float64), extra=1)
    assert len([record for record in caplog.records if record.name == verdict.__name__]) == 1


@methods
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("autocast", [True, False])
def test_the_dtype_is_the_fast_ways(method: str, bias: bool, autocast: bool, seed: int) -> None:
    base = nn.Sequential(nn.Linear(K, N, bias=bias)).double()
    model = adapted(method, seed, base).float()
    x = torch.randn(3, K)
    with torch.autocast("cpu", dtype=torch.bfloat16) if autocast else nullcontext():
        fast = model(x)
        hooked(model)
        slow = model(x)
    assert slow.dtype == fast.dtype == (torch.bfloat16 if autocast else torch.float32)
    scale = float(fast.abs().max())
    torch.testing.assert_close(slow, fast, rtol=0, atol=scale * (2**-5 if autocast else 2**-18))


@methods
@pytest.mark.parametrize("change", [None, hooked, two_adapters])
def test_the_meta_device_has_shapes(method: str, change: Any, seed: int) -> None:
    """And a graph: whoever estimates memory asks for gradients there."""
    model = adapted(method, seed)
    if change is not None:
        change(model)
    model.to("meta")
    y = model(torch.randn(2, 3, K, device="meta", dtype=torch.float64))
    assert (y.shape, y.dtype, y.is_meta) == ((2, 3, N), torch.float64, True)
    y.sum().backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not dk.accelerate(model).fused


@pytest.mark.parametrize("method", ["goat", "goat_of_one"])
def test_padding_hooks_go_with_the_last_adapter(method: str, seed: int) -> None:
    base = nn.Sequential(nn.Linear(K, N)).double()
    model = adapted(method, seed, base)
    model.add_adapter("second", CONFIGS[method]())
    assert len(base._forward_pre_hooks) == len(base._forward_hooks) == 1
    model.delete_adapter("second")
    assert len(base._forward_pre_hooks) == 1
    model.delete_adapter("default")
    assert not base._forward_pre_hooks
    assert not base._forward_hooks
    model.add_adapter("third", CONFIGS[method]())
    assert len(base._forward_pre_hooks) == 1


def test_gradients_have_memory_of_their_own(seed: int) -> None:
    model = adapted("goat", seed)
    model(torch.randn(3, K, dtype=torch.float64)).sum().backward()
    storages = [p.grad.untyped_storage().data_ptr() for p in model.parameters() if p.requires_grad]
    assert len(set(storages)) == len(storages) == 3


@methods
def test_the_remedy_fits_the_layer(method: str, seed: int) -> None:
    """restore() has nothing to give back to a layer of this library."""
    model, x = adapted(method, seed), torch.randn(3, K, dtype=torch.float64).requires_grad_()
    (dx,) = torch.autograd.grad(model(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="has no second derivative: .*use delora_kernels.reference") as caught:
        dx.sum().backward()
    assert "restore" not in str(caught.value)
