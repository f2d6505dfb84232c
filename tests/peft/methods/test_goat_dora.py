"""GoatConfig(use_dora=True) where a layer does more than one fused call: its start, beside a base
that runs its own forward, several adapters, merging. The fused call itself is judged in
test_goat.py.
"""

from typing import Any

import peft
import pytest
import torch
from goat_models import config, expected, layers, model, move, small
from golden_cases import relative_error
from torch import Tensor

import delora_kernels as dk

DORA = {"use_dora": True, "init_cof": 0.4}


def two_adapters(seed: int, **options: Any) -> Any:
    """A model with two active adapters, both with magnitudes and away from their starts."""
    made = model(small(seed), **DORA | options)
    other = {"init_weights": False, "normalize": True} | options
    made.add_adapter("other", config(**DORA | other))
    made.base_model.set_adapter(["default", "other"])
    move(made)
    return made.eval()


@pytest.mark.parametrize("options", [{"init_cof": 0.4}, {"normalize": True}, {"init_weights": False, "shared_A": True}])
def test_magnitude_starts_where_it_changes_nothing(options: dict[str, Any], seed: int) -> None:
    x, outputs = torch.randn(5, 12, dtype=torch.float64), []
    for dora in (False, True):
        onto = small(seed)
        torch.manual_seed(seed)
        made = model(onto, moved=False, use_dora=dora, **options).eval()
        outputs.append(made(x))
    assert relative_error(outputs[1], outputs[0]) <= 1e-13
    assert all(layer.goat_magnitude["default"].min() > 0 for layer in layers(made).values())


@pytest.mark.parametrize("name", ["first", "second", "third"])
def test_two_adapters_rescale_one_after_the_other(name: str, seed: int) -> None:
    """Fused with the base or beside one with a hook: what the reference makes of each adapter in
    turn, the second's norm that of W with its own update; and every gradient.
    """
    made = two_adapters(seed)
    layer: Any = made.get_submodule(f"base_model.model.{name}")
    x = torch.randn(6, layer.in_features, dtype=torch.float64, requires_grad=True)
    leaves = {n: p.detach().clone().requires_grad_() for n, p in layer.named_parameters() if p.requires_grad}
    y, bias = None, layer.base_layer.bias
    for adapter in ("default", "other"):
        own = {n.split(".")[0]: leaf for n, leaf in leaves.items() if n.endswith(adapter)}
        rescaled = expected(layer, x, own, adapter)[0] - (0 if bias is None else bias)
        if y is None:
            y = rescaled
            continue
        frozen = x @ layer._base_weight().T
        with torch.no_grad():  # c ⊙ (frozen + term) is what the reference gives: c is the same for y + term
            norm = (layer._base_weight() + layer.mean_update(adapter)).norm(dim=1)
        y = rescaled + own["goat_magnitude"] / norm * (y - frozen)
    want = y if bias is None else y + bias
    grad_out = torch.randn_like(want)
    wanted = torch.autograd.grad(want, [x, *leaves.values()], grad_out)
    for hooked in (False, True):
        if hooked:
            layer.base_layer.register_forward_hook(lambda *call: None)
        got = layer(x)
        trained = dict(layer.named_parameters())
        grads = torch.autograd.grad(got, [x, *(trained[n] for n in leaves)], grad_out)
        assert relative_error(got, want) <= 1e-12
        for leaf, ours, grad in zip(["x", *leaves], grads, wanted, strict=True):
            assert relative_error(ours, grad) <= 1e-11, (hooked, leaf)


@pytest.mark.parametrize("together", [True, False])
def test_adapters_of_one_expert_merge_exactly(together: bool, seed: int) -> None:
    made, x = two_adapters(seed, num_experts=1, top_k=1), torch.randn(5, 12, dtype=torch.float64)
    y = made(x)
    before = {name: layer.base_layer.weight.clone() for name, layer in layers(made).items()}
    for names in [["default", "other"]] if together else [["default"], ["other"]]:
        made.merge_adapter(names)
    assert relative_error(made(x), y) <= 1e-12
    made.unmerge_adapter()
    assert all(torch.equal(layer.base_layer.weight, before[name]) for name, layer in layers(made).items())
    assert torch.equal(made(x), y)


def test_merged_mean_gates_say_how_far_off_they_are(seed: int) -> None:
    """Of the first layer: what the merged weight makes of x against what the adapters made of
    it.
    """
    made, x = two_adapters(seed), torch.randn(9, 12, dtype=torch.float64)
    layer: Any = made.get_submodule("base_model.model.first")
    frozen, y = layer.base_layer(x), layer(x)
    report = dk.merge_mean_gate(made, x)
    error = float((layer.base_layer(x) - y).norm() / (y - frozen).norm())
    assert report.layers["base_model.model.first"] == pytest.approx(error, rel=1e-9)


def test_base_weight_that_is_elsewhere_is_refused(seed: int) -> None:
    made = model(small(seed), **DORA)
    layer: Any = made.get_submodule("base_model.model.first")
    dense = layer.base_layer.weight

    def bring(module: Any, args: tuple[Tensor, ...]) -> None:
        module.weight = dense

    def send(module: Any, *call: Any) -> None:
        module.weight = torch.nn.Parameter(dense.to("meta"), requires_grad=False)

    layer.base_layer.register_forward_pre_hook(bring), layer.base_layer.register_forward_hook(send)
    send(layer.base_layer)
    with pytest.raises(RuntimeError, match="adapter 'default' with use_dora=True needs the norms of its base weight"):
        layer(torch.randn(2, 12, dtype=torch.float64))


def test_exported_beside_a_base_that_runs_its_own_forward(seed: int) -> None:
    made, x = two_adapters(seed), torch.randn(4, 12, dtype=torch.float64)
    with torch.no_grad():
        program = torch.export.export(made, (x,)).module()
        assert relative_error(program(x), made(x)) <= 1e-12


def test_around_another_methods_adapters_it_is_refused(seed: int) -> None:
    inner = peft.get_peft_model(small(seed), peft.LoraConfig(r=2, target_modules=["first"]))
    with pytest.raises(
        ValueError, match="use_dora must be False around a layer with adapters of its own, got a Linear"
    ):
        peft.get_peft_model(inner.base_model.model, config(target_modules=["first"], **DORA))


def test_a_state_dict_without_a_magnitude_is_refused(seed: int) -> None:
    made = model(small(seed), **DORA)
    state = {key: value for key, value in made.state_dict().items() if "goat_magnitude" not in key}
    with pytest.raises(
        RuntimeError, match="adapter 'default' has use_dora=True, and the state dict .* has no magnitude"
    ):
        made.load_state_dict(state, strict=False)


def test_magnitude_moves_with_its_adapter(seed: int) -> None:
    layer: Any = model(small(seed), **DORA).get_submodule("base_model.model.first")
    layer._move_adapter_to_device_of_base_layer("default", torch.device("meta"))
    assert layer.goat_magnitude["default"].is_meta
    assert layer.goat_A["default"].is_meta
