"""What a group holds for a sibling is handed out where it is what the sibling's own call would
compute, once, and to nobody else; what nobody calls for goes.
"""

import gc
import threading
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_pairs import check_same, gradients
from siblings import TOKENS, K, Siblings, batch, model, pair, step, warm_up
from torch import Tensor, nn

import delora_kernels as dk

METHODS = ("lora", "dora", "delora")


def _swap_order(made: Any) -> None:
    made.base_model.model.order = "kvq"


def _hook(made: Any) -> None:
    made.base_model.model.k.register_forward_hook(lambda *_: None)


def _hook_leader(made: Any) -> None:
    made.base_model.model.q.register_forward_hook(lambda *_: None)


def _skip(made: Any) -> None:
    made.base_model.model.order = "qv"


def _twice(made: Any) -> None:
    made.base_model.model.order = "qkvqkv"


def _disable(made: Any) -> None:
    made.base_model.model.v.enable_adapters(False)


def _merge(made: Any) -> None:
    made.base_model.model.k.merge()


def _freeze(made: Any) -> None:
    made.base_model.model.k.lora_A["default"].weight.requires_grad_(False)


def _no_cast(made: Any) -> None:
    made.base_model.model.k.cast_input_dtype_enabled = False


def _replace(made: Any) -> None:
    layer = made.base_model.model.v.lora_B["default"]
    layer.weight = nn.Parameter(layer.weight.detach() * 2)


def _reshape(made: Any) -> None:
    layer = made.base_model.model.v
    for parts, dim in ((layer.lora_A, 0), (layer.lora_B, 1)):
        weight = parts["default"].weight
        weight.data = weight.data.narrow(dim, 0, 2)


def _restore(made: Any) -> None:
    dk.restore(made.base_model.model.k)


def _edit(made: Any) -> None:
    made.base_model.model.v.lora_B["default"].weight.data.mul_(3)


CHANGES: dict[str, tuple[Callable[[Any], None], list[int]]] = {
    "another order": (_swap_order, [3]),
    "a hook": (_hook, []),
    "a hook on the first": (_hook_leader, []),
    "one skipped": (_skip, [3]),
    "each called twice": (_twice, [3, 3]),
    "one disabled": (_disable, []),
    "one merged": (_merge, []),
    "one partly frozen": (_freeze, []),
    "one without its cast": (_no_cast, []),
    "one restored": (_restore, []),
    "a factor replaced": (_replace, [3]),
    "a rank changed": (_reshape, [3]),
    "a factor edited through .data": (_edit, [3]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_to_a_member(change: str, seed: int, shared: list[int]) -> None:
    made, plain = (model("lora", seed, inner=Siblings) for _ in range(2))
    dk.accelerate(made)
    warm_up(made)
    apply, groups = CHANGES[change]
    for each in (made, plain):
        apply(each)
    shared.clear()
    check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    assert shared == groups
    for _ in range(3):
        check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    if change == "another order":  # what nobody calls for is made once
        assert shared == [3]


BETWEEN: dict[str, Callable[[Any, Tensor], Any]] = {
    "nothing": lambda *_: None,
    "x changed in place": lambda _, x: x.mul_(1.0),
    "a factor replaced": lambda layers, _: setattr(
        layers.k.lora_A["default"], "weight", nn.Parameter(layers.k.lora_A["default"].weight.detach() * 2)
    ),
    "a factor changed in place": lambda layers, _: layers.k.lora_A["default"].weight.data.add_(0),
    "a factor's data replaced": lambda layers, _: setattr(
        layers.k.lora_A["default"].weight, "data", layers.k.lora_A["default"].weight.data * 2
    ),
    "another scale": lambda layers, _: layers.k.scaling.update(default=7.0),
    "disabled": lambda layers, _: layers.k.enable_adapters(False),
    "x alone requires grad": lambda _, x: x.requires_grad_(),
}


@pytest.mark.parametrize("first", ["straight", "planned"])
@pytest.mark.parametrize("what", BETWEEN)
def test_changes_between_two_siblings(
    what: str, first: str, seed: int, shared: list[int], planned: list[int], taken: list[str]
) -> None:
    """What is held for k is not handed out once anything else than rounding would differ; a first
    one whose bias is trained is planned, and the others with it.
    """
    results = []
    for accelerated in (True, False):
        made = model("lora", seed, inner=Siblings)
        layers, x = made.base_model.model, batch(seed)
        layers.q.base_layer.bias.requires_grad_(first == "planned")
        if accelerated:
            dk.accelerate(made)
            warm_up(made)
        q = layers.q(x)
        if accelerated:
            assert (shared if first == "straight" else planned) == [3, 3]
            taken.clear()
        with torch.no_grad():
            if what == "a factor changed in place":
                layers.k.lora_A["default"].weight.mul_(2)
            BETWEEN[what](layers, x)
        k = layers.k(x)
        results.append({"q": q.detach(), "k": k.detach()})
        assert not accelerated or (taken == []) is (what in ("nothing", "disabled"))
    check_same(*results, 1e-12)


def test_siblings_of_another_x(seed: int) -> None:
    """A tensor of the same shape and version that is not the leader's, a view of it, a copy."""
    made, plain, _ = pair("lora", seed, inner=Siblings)
    ours, theirs = made.base_model.model, plain.base_model.model
    x, others = batch(seed), [batch(seed + 1), batch(seed).view(*TOKENS, K), batch(seed).clone()]
    for other in others:
        with torch.no_grad():
            results = [{"q": layers.q(x), "k": layers.k(other), "v": layers.v(x)} for layers in (ours, theirs)]
        check_same(*results, 1e-12)


def test_surroundings_between_two_siblings(seed: int) -> None:
    """Grad mode, saved-tensor hooks and threads are what they are at a layer's own call."""
    made, _, _ = pair("lora", seed, inner=Siblings)
    layers, x = made.base_model.model, batch(seed)
    layers.q(x)
    with torch.no_grad():
        assert not layers.k(x).requires_grad
    assert layers.v(x).requires_grad
    packed: list[Tensor] = []
    layers.q(x)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: packed.append(t) or t, lambda t: t):
        layers.k(x)
    assert len(packed) > 2
    with torch.no_grad():
        layers.q(x)
    assert layers.k(x).requires_grad
    layers.q(x)
    found: list[Tensor] = []
    thread = threading.Thread(target=lambda: found.append(layers.k(x)))
    thread.start()
    thread.join()
    assert found[0].grad_fn is not layers.k(x).grad_fn


@pytest.mark.parametrize("what", [None, "lora_A", "lora_B"])
def test_a_factor_frozen_between_two_siblings(what: str | None, seed: int) -> None:
    """Its layer is not handed the output of a group that was to train it."""
    made = model("lora", seed, inner=Siblings)
    layers, x = made.base_model.model, batch(seed)
    dk.accelerate(made)
    warm_up(made)
    q = layers.q(x)
    if what is not None:
        getattr(layers.k, what)["default"].weight.requires_grad_(False)
    assert (layers.k(x).grad_fn is q.grad_fn) is (what is None)


def test_nothing_is_held_once_x_is_gone(seed: int) -> None:
    """A skipped sibling's output goes with x, or with the next group's call; then it is left
    out.
    """
    made, _, report = pair("lora", seed, inner=Siblings)
    made.base_model.model.order = "qk"

    def live() -> int:
        gc.collect()
        return sum(isinstance(each, Tensor) and each.shape == (*TOKENS, 24) for each in gc.get_objects())

    with torch.no_grad():
        before = live()
        made.eval()(batch(seed))
        assert live() == before
    assert len(report.groups[0]) == 3
    made.train()
    made(batch(seed)).sum().backward()
    assert live() == before
    assert [len(group) for group in report.groups] == [2]
    made.base_model.model.order = "qkv"
    plain = model("lora", seed, inner=Siblings)
    check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)


def test_a_layer_that_goes_takes_its_group_with_it(seed: int) -> None:
    made, _, report = pair("lora", seed)
    gone = weakref.ref(made.base_model.model[0].attention.q)
    del made
    gc.collect()
    assert gone() is None
    assert report.groups == ()


@pytest.mark.parametrize("method", METHODS)
def test_gradients_through_some_outputs(method: str, seed: int) -> None:
    """An output without a gradient costs nothing: its factors' gradients are None, never zeros."""
    made, plain, _ = pair(method, seed, inner=Siblings)
    results = []
    for each in (made, plain):
        layers, x = each.base_model.model, batch(seed).requires_grad_()
        y = {name: getattr(layers, name)(x) for name in "qkv"}
        each.zero_grad(set_to_none=True)
        y["k"].square().sum().backward(retain_graph=True)
        first = {"x": x.grad.clone()} | gradients(each)
        assert {name.split(".")[2] for name in first if "." in name} == {"k"}
        (y["v"].sin().sum() + y["k"].sum()).backward()
        results.append((first, {"x": x.grad} | gradients(each)))
    for ours, theirs in zip(*results, strict=True):
        check_same(ours, theirs, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_a_second_backward_pass_through_another_output(method: str, seed: int) -> None:
    """What differs from layers alone is said by torch; with retain_graph nothing does."""
    made, plain, _ = pair(method, seed, inner=Siblings)
    for retain_graph in (False, True):
        results = []
        for each in (made, plain):
            layers = each.base_model.model
            each.zero_grad(set_to_none=True)
            q, k = layers.q(x := batch(seed)), layers.k(x)
            q.sum().backward(retain_graph=retain_graph)
            if each is made and not retain_graph:
                with pytest.raises(RuntimeError, match="a second time"):
                    k.sum().backward()
                continue
            k.sum().backward()
            results.append(gradients(each))
        if retain_graph:
            check_same(*results, 1e-12)


@pytest.mark.parametrize("when", ["watched", "missed"])
def test_siblings_that_are_restored(when: str, seed: int) -> None:
    """A layer that restore() took away leaves the others to share: before the groups are known, and
    while one waits to be left out.
    """
    made, plain = model("lora", seed, inner=Siblings), model("lora", seed, inner=Siblings)
    report = dk.accelerate(made)
    layers = made.base_model.model
    if when == "watched":
        made(batch(seed))
    else:
        warm_up(made)
        layers.order = "qv"
        for _ in range(2):
            y = made(batch(seed))  # each graph is kept, so that k stays in the group
        layers.order = "qkv"
    dk.restore(layers.k)
    for _ in range(3):
        check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
        y = None  # noqa: F841, the graph goes
    assert report.groups == (("base_model.model.q", "base_model.model.v"),)
