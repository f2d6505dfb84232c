"""Merging of the library's own methods while others write too: moves, copies, loads, edits, nested
tuners.
"""

import copy
import io
import itertools
import pickle
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from own_methods import CONFIGS, MERGEABLE, K, adapted, layers, weight
from torch import Tensor, nn

methods = pytest.mark.parametrize("method", MERGEABLE)
CLOSE = {"rtol": 0.0, "atol": 1e-13}
"""A handful of sums of numbers of size 1, in float64."""


def saved_and_loaded(model: Any) -> Any:
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS: dict[str, Callable[[Any], Any]] = {
    "dtype": lambda model: model.to(torch.bfloat16),
    "there and back": lambda model: model.to(torch.float32).to(torch.float64),
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "copied, then converted": lambda model: copy.deepcopy(model).half().bfloat16(),
}


@methods
@pytest.mark.parametrize("way", WAYS)
def test_the_base_weight_comes_along(method: str, way: str, seed: int) -> None:
    """As it would be without merging, bit for bit, and the layer works."""
    model = adapted(method, seed)
    expected = WAYS[way](copy.deepcopy(model))
    model.merge_adapter()
    merged = weight(model).clone()
    moved = WAYS[way](model)
    assert not torch.equal(weight(moved).double(), merged) or weight(moved).dtype == torch.float64
    moved.unmerge_adapter()
    assert weight(moved).dtype == weight(expected).dtype
    assert torch.equal(weight(moved), weight(expected))
    x = torch.randn(3, K, dtype=weight(moved).dtype)
    assert torch.equal(moved(x), expected(x))


@methods
def test_what_is_kept_goes_to_other_devices(method: str, seed: int) -> None:
    model = adapted(method, seed)
    model.merge_adapter()
    model.to("meta")
    assert layers(model)[0]._unmerged.is_meta


@methods
def test_a_state_dict_of_the_merged_model_changes_nothing(method: str, seed: int) -> None:
    model = adapted(method, seed)
    before = weight(model).clone()
    model.merge_adapter()
    model.load_state_dict(copy.deepcopy(model.state_dict()))
    model.unmerge_adapter()
    assert torch.equal(weight(model), before)


def loaded(base: Any, change: Tensor) -> None:
    base.load_state_dict({"weight": base.weight + change, "bias": base.bias})


def edited(base: Any, change: Tensor) -> None:
    with torch.no_grad():
        base.weight.add_(change)


def edited_behind(base: Any, change: Tensor) -> None:
    base.weight.data += change


def replaced(base: Any, change: Tensor) -> None:
    base.weight.data = base.weight.data + change


@methods
@pytest.mark.parametrize("write", [loaded, edited, edited_behind, replaced])
def test_what_others_write_while_merged_stays(method: str, write: Callable[..., None], seed: int) -> None:
    model = adapted(method, seed)
    layer, before = layers(model)[0], weight(model).clone()
    change = torch.randn(before.shape, dtype=torch.float64)
    model.merge_adapter()
    write(layer.get_base_layer(), change)
    with pytest.warns(UserWarning, match="has changed since"):
        model.unmerge_adapter()
    torch.testing.assert_close(weight(model), before + change, **CLOSE)
    assert not layer.merged


@methods
def test_what_can_not_be_undone_is_refused_and_left_alone(method: str, seed: int) -> None:
    """The base weight and the adapter have both changed: nobody knows what to take away."""
    model = adapted(method, seed)
    layer = layers(model)[0]
    model.merge_adapter()
    merged = weight(model).clone()
    weight(model).mul_(2)
    parts = [p for name, p in model.named_parameters() if "base_layer" not in name and "router" not in name]
    originals = [p.detach().clone() for p in parts]
    for p in parts:
        p.data.add_(torch.randn_like(p))
    with pytest.raises(RuntimeError, match="nothing was changed"):
        model.unmerge_adapter()
    assert layer.merged
    assert torch.equal(weight(model), 2 * merged)
    for p, original in zip(parts, originals, strict=True):
        p.data.copy_(original)
    with pytest.warns(UserWarning, match="has changed since"):
        model.unmerge_adapter()


@methods
def test_adapters_merged_one_after_the_other(method: str, seed: int) -> None:
    """With a change of the base in between, which stays."""
    model = adapted(method, seed)
    model.add_adapter("second", CONFIGS[method]())
    model.base_model.set_adapter(["default", "second"])
    model.double()
    layer, before = layers(model)[0], weight(model).clone()
    layer.merge(adapter_names=["default"])
    layer.merge(adapter_names=["second"])
    layer.unmerge()
    assert torch.equal(weight(model), before)
    layer.merge(adapter_names=["default"])
    weight(model).add_(1)
    with pytest.warns(UserWarning, match="has changed since"):
        layer.merge(adapter_names=["second"])
    layer.unmerge()
    torch.testing.assert_close(weight(model), before + 1, **CLOSE)


@pytest.mark.parametrize("merges", ["inner first", "outer first"])
@pytest.mark.parametrize("unmerges", ["inner first", "outer first"])
@pytest.mark.parametrize(("inner", "outer"), itertools.permutations(("lora", *MERGEABLE), 2))
def test_tuners_around_each_other(inner: str, outer: str, merges: str, unmerges: str, seed: int) -> None:
    """In either order the weight comes back, and while merged the outputs are the same; or a merge
    is refused.
    """
    torch.manual_seed(seed)
    model: Any = nn.Sequential(nn.Linear(K, 12)).double()
    for method in (inner, outer):
        if method == "lora":
            config = peft.LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
            model = peft.get_peft_model(model, config).double()
        else:
            model = adapted(method, seed, model)
    around, within = layers(model)
    before, x = weight(model).clone(), torch.randn(3, K, dtype=torch.float64)
    y = model(x)
    first = [within, around] if merges == "inner first" else [around, within]
    if merges == "outer first" and "ether" in outer + inner and outer != "lora":
        with pytest.raises(RuntimeError, match="merge those first"):
            around.merge()
        assert torch.equal(weight(model), before)
        return
    for layer in first:
        layer.merge()
    if outer != "lora" or merges == "inner first" or inner == "goat_of_one":
        torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
    for layer in [within, around] if unmerges == "inner first" else [around, within]:
        layer.unmerge()
    torch.testing.assert_close(weight(model), before, **CLOSE)
    torch.testing.assert_close(model(x), y, rtol=0, atol=1e-12)
