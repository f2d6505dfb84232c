"""ETHER's and ETHER+'s layers in PEFT: start, outputs, gradients and merged weights against the
reference; errors.
"""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from ether_models import KINDS, TARGETS, arguments, config, expected_weight, layers, model, small, weight_of
from golden_cases import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk
from delora_kernels import reference

pytestmark = pytest.mark.oldest_peft

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize(("name", "reentrant"), [("first", None), ("first", True), ("second", False)])
def test_output_and_gradients_are_the_references(kind: str, name: str, reentrant: bool | None, seed: int) -> None:
    """nn.Linear and Conv1D; both kinds of checkpointing."""
    made = model(small(seed), kind)
    layer = made.get_submodule(f"base_model.model.{name}")
    options, base = layer.options["default"], layer.get_base_layer()
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(3, 5, layer.out_features, dtype=torch.float64)
    leaves = arguments(layer)
    sides = {"input": [""], "output": ["_out"], "both": ["", "_out"]}[options.side]
    assert set(leaves) == {letter + side for letter in ("uv" if KINDS[kind][0] else "u") for side in sides}
    function = reference.ether_plus_linear if KINDS[kind][0] else reference.ether_linear
    y = function(x, weight_of(base), bias=base.bias.detach(), blocks=options.blocks, **leaves)
    want = torch.autograd.grad(y, [x, *leaves.values()], grad_out)
    got = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    got.backward(grad_out)
    assert relative_error(got, y) <= 1e-12
    trained = {name.split(".")[0].split("_", 1)[1]: p for name, p in layer.named_parameters() if p.requires_grad}
    assert set(trained) == set(leaves)
    for leaf, grad in zip(["x", *leaves], want, strict=True):
        ours = x.grad if leaf == "x" else trained[leaf].grad
        assert relative_error(ours, grad) <= 1e-11, leaf


@every_kind
def test_start_is_the_authors(kind: str, seed: int) -> None:
    """ETHER+ starts as the base model, ETHER at ‖H − I‖ = 2; vectors are Kaiming uniform, within 1
    / √columns.
    """
    base = small(seed)
    made = model(base, kind, moved=False)
    x = torch.randn(7, 12, dtype=torch.float64)
    for layer in layers(made).values():
        vectors = arguments(layer)
        for name, value in vectors.items():
            assert 0 < value.abs().max() <= value.shape[1] ** -0.5
            assert not name.startswith("v") or torch.equal(value, -vectors[name.replace("v", "u")])
    error = relative_error(made(x), base(x))
    assert error <= 1e-13 if KINDS[kind][0] else error > 1e-3


def test_a_start_for_tests_is_random(seed: int) -> None:
    base = small(seed)
    x = torch.randn(7, 12, dtype=torch.float64)
    assert relative_error(model(base, "ether+", moved=False, init_weights=False)(x), base(x)) > 1e-3


@every_kind
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_merged_weight_is_the_references_and_comes_back(kind: str, dtype: torch.dtype, seed: int) -> None:
    base = small(seed, dtype)
    made = model(base, kind).eval()
    x = torch.randn(5, 12, dtype=torch.float64).to(dtype)
    y = made(x)
    made.merge_adapter(safe_merge=True)
    merged = made(x)
    if dtype == torch.float64:
        assert relative_error(merged, y) <= 1e-12
    for name, layer in layers(made).items():
        was = weight_of(base.get_submodule(name.removeprefix("base_model.model.")))
        vectors = {name: value.detach().double() for name, value in arguments(layer).items()}
        want = expected_weight(kind, was.double(), vectors, layer.options["default"].blocks)
        error = relative_error(weight_of(layer.get_base_layer()).double(), want)
        # in float32, whose error is far below the other's, and rounded once: half a unit in the
        # last place
        assert error <= (1e-12 if dtype == torch.float64 else 0.51 * torch.finfo(dtype).eps)
    with made.disable_adapter():
        assert torch.equal(made(x), base(x))
    made.unmerge_adapter()
    assert torch.equal(made(x), y)
    plain = made.merge_and_unload()
    assert torch.equal(plain(x), merged)
    assert not layers(plain)


def test_broken_vectors_are_not_merged(seed: int) -> None:
    made = model(small(seed), "ether+")
    layer = made.get_submodule("base_model.model.first")
    layer.etherplus_u["default"].data[0, 0] = torch.nan
    before = layer.get_base_layer().weight.clone()
    with pytest.raises(ValueError, match="NaNs detected"):
        made.merge_adapter(safe_merge=True)
    assert torch.equal(layer.get_base_layer().weight, before)
    assert not layer.merged


@pytest.mark.parametrize("kind", ["ether both", "ether+", "ether+ official"])
def test_several_active_adapters_stand_around_each_other(kind: str, seed: int) -> None:
    """Forward, gradients and the merged weight: each reflects what the one before it made."""
    made = model(small(seed), kind)
    made.add_adapter("other", config(kind, n_blocks=1, target_modules=["first"]))
    made.base_model.set_adapter(["default", "other"])
    layer = made.get_submodule("base_model.model.first")
    for _, parameter in layer.named_parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    first, other, base = arguments(layer), arguments(layer, "other"), layer.get_base_layer()
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    inner = expected_weight(kind, base.weight.detach(), first, layer.options["default"].blocks)
    y = x @ expected_weight(kind, inner, other, layer.options["other"].blocks).T + base.bias.detach()
    grad_out = torch.randn_like(y)
    leaves = [*first.values(), *other.values()]
    want = torch.autograd.grad(y, [x, *leaves], grad_out)
    got = layer(x)
    assert relative_error(got, y) <= 1e-12
    trained = [
        getattr(layer, layer._prefix + part)[name]
        for name, vectors in (("default", first), ("other", other))
        for part in vectors
    ]
    for ours, grad in zip(torch.autograd.grad(got, [x, *trained], grad_out), want, strict=True):
        assert relative_error(ours, grad) <= 1e-11
    made.merge_adapter()
    assert relative_error(made.get_submodule("base_model.model.first")(x), y) <= 1e-12


@pytest.mark.parametrize("kind", ["ether", "ether out", "ether+"])
def test_hooked_base_layer_runs_with_its_hooks(kind: str, seed: int) -> None:
    made = model(small(seed), kind)
    made.add_adapter("other", config(kind, n_blocks=1))
    made.base_model.set_adapter(["default", "other"])
    layer = made.get_submodule("base_model.model.first")
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    trained = [x, *(p for p in layer.parameters() if p.requires_grad)]
    plain, seen = layer(x), []
    grad_out = torch.randn_like(plain)
    want = torch.autograd.grad(plain, trained, grad_out)
    layer.base_layer.register_forward_hook(lambda *call: seen.append(call))
    with torch.profiler.profile() as profile:
        hooked = layer(x)
    assert "aten::eye" not in {event.name for event in profile.events()}  # reflected without a GEMM for it
    assert len(seen) == 1
    assert relative_error(hooked, plain) <= 1e-12
    for ours, grad in zip(torch.autograd.grad(hooked, trained, grad_out), want, strict=True):
        assert relative_error(ours, grad) <= 1e-11


def test_hooked_base_layer_with_official_blocks_is_refused(seed: int) -> None:
    made = model(small(seed), "ether official")
    made.get_submodule("base_model.model.first.base_layer").register_forward_hook(lambda *call: None)
    with pytest.raises(RuntimeError, match='can\'t be read here: the base layer has hooks; use blocks="paper"'):
        made(torch.randn(4, 12, dtype=torch.float64))


def test_dropout_is_drawn_anew_and_only_in_training(seed: int) -> None:
    made = model(small(seed), "ether+", dropout=0.4)
    x = torch.randn(9, 12, dtype=torch.float64)
    torch.manual_seed(seed)
    first, second = made.train()(x), made(x)
    torch.manual_seed(seed)
    assert torch.equal(first, made(x))
    assert not torch.equal(first, second)
    assert torch.equal(made.eval()(x), made(x))


def test_compiled_layer_is_one_graph_and_the_same(seed: int) -> None:
    made = model(small(seed, torch.float32), "ether+").get_submodule("base_model.model.first")
    x, grads = torch.randn(9, 12), []
    compiled: Any = torch.compile(copy.deepcopy(made), backend="aot_eager", fullgraph=True)
    for one in (made, compiled):
        one(x).square().sum().backward()
        grads.append([p.grad for p in one.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("kind", ["ether", "ether+"])
def test_accelerate_reports_it_as_fused_and_export_refuses(kind: str, seed: int, tmp_path: Path) -> None:
    made = model(small(seed), kind)
    report = dk.accelerate(made, strict=True)
    assert [layer.method for layer in report.fused] == [kind] * 2
    assert dk.restore(made) == 0
    with pytest.raises(ValueError, match="layer 'first' must be .*, got reflections before and after"):
        dk.export_lora(made, tmp_path / "folder")


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"n_blocks": 0}, ValueError, "Config: n_blocks must be ≥ 1, got 0"),
        ({"n_blocks": 2.0}, TypeError, "n_blocks must be an int"),
        ({"side": "left"}, ValueError, "side must be one of"),
        ({"blocks": "code"}, ValueError, "blocks must be one of"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform must be given with layers_pattern"),
        ({"target_modules": "a.*", "layers_to_transform": 1}, ValueError, "must be None with a string"),
    ],
)
def test_config_errors(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    for method in ("ether", "ether+"):
        with pytest.raises(kind, match=words):
            config(method, **options)


def test_layers_that_cannot_be_adapted_are_named(seed: int) -> None:
    with pytest.raises(ValueError, match="EtherPlusConfig: n_blocks must be a divisor of out_features = 9, got 2"):
        model(small(seed), "ether+", target_modules=TARGETS)
    with pytest.raises(TypeError, match="EtherModel: target module 'emb' must be nn.Linear or Transformers' Conv1D"):
        peft.get_peft_model(nn.ModuleDict({"emb": nn.Embedding(4, 4)}), config("ether", target_modules=["emb"]))
