"""GOAT's layers in PEFT: their start, their outputs and every gradient, against the reference;
options and errors.
"""

import copy
from typing import Any

import peft
import pytest
import torch
from goat_models import KINDS, config, expected, layers, model, move, small
from golden_cases import relative_error
from torch import nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk
from delora_kernels.nn import set_loss_scale
from delora_kernels.nn.goat_start import moe_start

pytestmark = pytest.mark.oldest_peft

every_kind = pytest.mark.parametrize("kind", KINDS)


@every_kind
@pytest.mark.parametrize(("name", "reentrant"), [("first", None), ("second", True), ("third", False)])
def test_output_and_gradients_are_the_references(kind: str, name: str, reentrant: bool | None, seed: int) -> None:
    """nn.Linear with and without bias, Conv1D; both kinds of checkpointing; the losses' gradients
    among them.
    """
    made = model(small(seed), z_coef=0.2, **{"balance_coef": 0.4} | KINDS[kind])
    layer = made.get_submodule(f"base_model.model.{name}")
    x = torch.randn(3, 5, layer.in_features, dtype=torch.float64, requires_grad=True)
    grad_out = torch.randn(3, 5, layer.out_features, dtype=torch.float64)
    trained = {name: p for name, p in layer.named_parameters() if p.requires_grad}
    options, more = layer.options["default"], {"lambda": "normalize", "magnitude": "use_dora"}
    own = ["A", "B", "router", *(part for part, option in more.items() if getattr(options, option))]
    assert set(trained) == {f"goat_{part}.default" for part in own}
    leaves = {name.split(".")[0]: p.detach().clone().requires_grad_() for name, p in trained.items()}
    y, stats = expected(layer, x, leaves)
    loss = (y * grad_out).sum() + 0.4 * stats.balance_loss(layer.options["default"].balance) + 0.2 * stats.z
    want = torch.autograd.grad(loss, [x, *leaves.values()])
    got = layer(x) if reentrant is None else checkpoint(layer, x, use_reentrant=reentrant)
    got.backward(grad_out)
    assert relative_error(got, y) <= 1e-12
    assert relative_error(layer.router_stats["default"].balance_loss(), stats.balance_loss()) <= 1e-12
    for leaf, grad in zip(["x", *leaves], want, strict=True):
        ours = x.grad if leaf == "x" else trained[f"{leaf}.default"].grad
        assert relative_error(ours, grad) <= 1e-11, leaf


@every_kind
def test_start(kind: str, seed: int) -> None:
    """Experts with B = 0: exactly the base. GOAT's: the base where all gates are 1/E, and the
    published factors.
    """
    base = small(seed)
    made = model(base, moved=False, **KINDS[kind])
    x = torch.randn(7, 12, dtype=torch.float64)
    y, start = base(x), made.peft_config["default"].start
    if start == "zero":
        assert relative_error(made(x), y) <= (1e-3 if made.peft_config["default"].normalize else 0)
    else:
        assert relative_error(made(x), y) > 1e-3
    if start in ("zero", "random"):
        assert not any("start" in key for key in made.state_dict())
        return
    for layer in layers(made).values():
        weight = layer._base_weight()
        c = layer.options["default"]
        A, B, scale, _ = moe_start(weight, 4, 2, start, c.scaling)
        assert torch.equal(layer.goat_A["default"], A.double())
        assert torch.equal(layer.goat_B["default"], B.double())
        assert torch.equal(layer.goat_scale["default"], scale)
        assert torch.equal(layer.goat_A["default"], layer.goat_start_A["default"])
        assert layer.goat_A["default"].data_ptr() != layer.goat_start_A["default"].data_ptr()
        c.top_k, c.init_cof = None, None
        layer.goat_router["default"].data.zero_()
        layer.reset_magnitude("default")
    assert relative_error(made(x), y) <= 1e-13


@every_kind
def test_training_leaves_the_base_alone_and_disabled_it_is_the_base(kind: str, seed: int) -> None:
    base = small(seed, torch.bfloat16)
    made = model(base, moved=False, **KINDS[kind])
    x = torch.randn(7, 12).bfloat16()
    optimizer = torch.optim.AdamW(made.parameters(), lr=0.1, weight_decay=0.5)
    before = {name: p.detach().clone() for name, p in made.named_parameters()}
    made(x).float().square().sum().backward()
    optimizer.step()
    moved = {name for name, p in made.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name in before if ".goat_" in name}
    with made.disable_adapter():
        assert torch.equal(made(x), base(x))
    assert not torch.equal(made(x), base(x))


def test_losses_are_scaled_and_only_in_training(seed: int) -> None:
    base = small(seed)
    made, plain = model(base, balance_coef=0.7, z_coef=0.1), model(base, balance_coef=0.0)
    plain.load_state_dict(made.state_dict())
    x = torch.randn(9, 12, dtype=torch.float64)

    def grads(one: Any) -> list[torch.Tensor]:
        one.zero_grad()
        (1e-4 * one(x).square().sum()).backward()  # smaller than the losses, in which its rounding would show
        return [layer.goat_router["default"].grad.clone() for layer in layers(one).values()]

    task, both = grads(plain), grads(made)
    set_loss_scale(made, 3.0)
    for ours, want, one in zip(grads(made), both, task, strict=True):
        assert not torch.equal(want, one)
        assert ((ours - one) - 3 * (want - one)).abs().max() <= 1e-13 * ours.abs().max()
    made.eval(), plain.eval()
    assert all(torch.equal(a, b) for a, b in zip(grads(made), grads(plain), strict=True))


def test_dropout_is_drawn_anew_and_only_in_training(seed: int) -> None:
    made = model(small(seed), dropout=0.4)
    for kind in ("shared", "independent"):
        made.peft_config["default"].dropout_kind = kind
        x = torch.randn(9, 12, dtype=torch.float64)
        made.train()
        torch.manual_seed(seed)
        first, second = made(x), made(x)
        torch.manual_seed(seed)
        assert torch.equal(first, made(x))
        assert not torch.equal(first, second)
        made.eval()
        assert torch.equal(made(x), made(x))


def test_two_active_adapters_add_up(seed: int) -> None:
    base = small(seed)
    made = model(base)
    made.add_adapter("other", config(num_experts=3, r=1, init_weights=False, target_modules=["first", "third"]))
    made.base_model.set_adapter(["default", "other"])
    move(made)
    x = torch.randn(4, 12, dtype=torch.float64, requires_grad=True)
    layer = made.get_submodule("base_model.model.first")
    both = layer(x)
    alone = []
    for name in ("default", "other"):
        made.set_adapter(name)
        alone.append(layer(x))
    made.base_model.set_adapter(["default", "other"])
    assert relative_error(both, alone[0] + alone[1] - layer.base_layer(x)) <= 1e-13
    grad = torch.randn_like(both)
    ours = torch.autograd.grad(both, x, grad)[0]
    parts = [torch.autograd.grad(y, x, grad)[0] for y in (*alone, layer.base_layer(x))]
    assert relative_error(ours, parts[0] + parts[1] - parts[2]) <= 1e-12


def test_hooked_base_layer_runs_with_its_hooks(seed: int) -> None:
    made = model(small(seed))
    layer = made.get_submodule("base_model.model.first")
    x = torch.randn(4, 12, dtype=torch.float64)
    plain, seen = layer(x), []
    hook = layer.base_layer.register_forward_hook(lambda *call: seen.append(call))
    assert relative_error(layer(x), plain) <= 1e-13
    assert len(seen) == 1
    hook.remove()


def test_compiled_model_is_one_graph_and_the_same(seed: int) -> None:
    made = model(small(seed, torch.float32), balance_coef=0.3)
    x, grads = torch.randn(9, 12), []
    compiled = torch.compile(copy.deepcopy(made), backend="aot_eager", fullgraph=True)
    for one in (made, compiled):
        one(x).square().sum().backward()
        grads.append([p.grad for p in one.parameters() if p.requires_grad])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        ({"r": 0}, ValueError, "GoatConfig: r must be ≥ 1, got 0"),
        ({"rank_pattern": {"first": 1.5}}, TypeError, "r must be an int"),
        ({"num_experts": True}, TypeError, "num_experts must be an int"),
        ({"top_k": 5}, ValueError, "top_k must be at most num_experts = 4, got 5"),
        ({"dropout": 1.0}, ValueError, "dropout"),
        ({"dropout_kind": "none"}, ValueError, "dropout_kind must be one of"),
        ({"balance_coef": -1.0}, ValueError, "balance_coef must be ≥ 0"),
        ({"balance": "switch"}, ValueError, "balance must be one of"),
        ({"init_weights": "svd"}, ValueError, "init_weights must be one of"),
        ({"scaling": "lora"}, ValueError, "scaling must be one of"),
        ({"svd": "fast"}, ValueError, "svd must be one of"),
        ({"bias": "lora_only"}, ValueError, "bias must be one of"),
        (
            {"normalize": True, "init_weights": "goat"},
            ValueError,
            'init_weights must be True, "zero" or False',
        ),
        ({"shared_A": True, "init_weights": "pissa"}, ValueError, "with shared_A=True"),
        ({"shared_A": True, "normalize": True}, ValueError, "shared_A must be False with normalize=True"),
        ({"layers_pattern": "h"}, ValueError, "layers_to_transform must be given with layers_pattern"),
        (
            {"target_modules": "a.*", "layers_to_transform": 1},
            ValueError,
            "must be None with a string",
        ),
    ],
)
def test_config_errors(options: dict[str, Any], kind: type[Exception], words: str) -> None:
    with pytest.raises(kind, match=words):
        config(**options)


def test_layers_that_cannot_be_adapted_are_named(seed: int) -> None:
    with pytest.raises(ValueError, match="r must be at most min\\(N, K\\) // E = 2, got 3"):
        model(small(seed), r=3)
    with pytest.raises(TypeError, match="target module 'emb' must be nn.Linear or Transformers' Conv1D"):
        peft.get_peft_model(nn.ModuleDict({"emb": nn.Embedding(4, 4)}), config(target_modules=["emb"]))


def test_accelerate_reports_it_as_fused_and_export_refuses(seed: int, tmp_path: Any) -> None:
    made = model(small(seed))
    report = dk.accelerate(made, strict=True)
    assert [layer.method for layer in report.fused] == ["goat"] * 3
    assert dk.restore(made) == 0
    with pytest.raises(ValueError, match="layer 'first' must be .*, got a mixture, whose"):
        dk.export_lora(made, tmp_path / "folder")
