"""The mean-gate merge: the weight it makes, what it measures, and the way back."""

from typing import Any

import peft
import pytest
import torch
from goat_models import KINDS, layers, model, small
from golden_cases import relative_error
from tiny_llama import base, tokens
from torch import Tensor

import delora_kernels as dk

every_kind = pytest.mark.parametrize("kind", KINDS)


def mean_gated(made: Any, onto: Any) -> dict[str, Tensor]:
    """W + Σ_e s_e B_e A_e / E − γ Σ_e s_e B⁰_e A⁰_e of every layer, one expert after the other, its
    rows of the magnitude's length if there is one.
    """
    weights = {}
    for name, layer in layers(made).items():
        short = name.removeprefix("base_model.model.")
        c, W = layer.options["default"], onto.get_submodule(short).weight.detach().clone()
        delta = torch.zeros_like(layer._base_weight())
        A, B = layer.goat_A["default"].detach(), layer.goat_B["default"].detach()
        for e in range(c.num_experts):
            A_e, B_e = A if c.shared_A else A[e], B[e]
            if c.normalize:
                scale = layer.goat_lambda["default"][e].item() / 2
                A_e = A_e / A_e.norm(dim=1, keepdim=True) * layer.goat_w_norm["default"]
                B_e = B_e / B_e.norm(dim=0, keepdim=True)
            else:
                scale = layer.goat_scale["default"][e].item()
            delta += scale / c.num_experts * B_e @ A_e
            if "default" in layer.goat_start_A:
                gamma = 1 / c.num_experts if c.init_cof is None else c.init_cof
                delta -= gamma * scale * layer.goat_start_B["default"][e] @ layer.goat_start_A["default"][e]
        merged = W + (delta.t() if short == "second" else delta)
        if c.use_dora:
            rows = merged.t() if short == "second" else merged
            rows *= (layer.goat_magnitude["default"].detach() / rows.norm(dim=1))[:, None]
        weights[short] = merged
    return weights


@every_kind
def test_it_is_the_mean_gates_weight_and_what_it_says_of_it(kind: str, seed: int) -> None:
    onto = small(seed)
    made = model(onto, **KINDS[kind])
    x = torch.randn(9, 12, dtype=torch.float64)
    want, y = mean_gated(made, onto), made.eval()(x)
    made.train()
    report = dk.merge_mean_gate(made, x)
    assert made.training
    assert sorted(report.layers) == sorted(layers(made))
    merged = made(x)
    for name, weight in want.items():
        assert relative_error(made.get_submodule(f"base_model.model.{name}.base_layer").weight, weight) <= 1e-12
    assert report.difference == pytest.approx(float((merged - y).norm() / y.norm()), rel=1e-9)
    assert report.of_effect == pytest.approx(float((merged - y).norm() / (y - onto(x)).norm()), rel=1e-9)
    assert report.difference > 1e-3
    assert str(report).startswith("merged the mean gate of 3 layers, an approximation: outputs differ by ")
    made.unmerge_adapter()
    assert torch.equal(made.eval()(x), y)
    dk.merge_mean_gate(made, (x,))
    with pytest.warns(UserWarning, match="already merged"):
        plain = made.merge_and_unload()
    assert torch.equal(plain(x), merged)
    assert not layers(plain)


def test_differences_of_the_first_layer_are_those_of_its_update(seed: int) -> None:
    onto = small(seed)
    made = model(onto).eval()
    x = torch.randn(9, 12, dtype=torch.float64)
    layer = made.get_submodule("base_model.model.first")
    W, update = layer.base_layer, layer(x) - layer.base_layer(x)
    mean = x @ (mean_gated(made, onto)["first"] - W.weight).T
    report = dk.merge_mean_gate(made, x)
    error = float((mean - update).norm() / update.norm())
    assert report.layers["base_model.model.first"] == pytest.approx(error, rel=1e-9)


def test_undecided_routers_merge_exactly(seed: int) -> None:
    """Where every gate is 1/E nothing is approximated."""
    made = model(small(seed), top_k=None)
    for layer in layers(made).values():
        layer.goat_router["default"].data.zero_()
    report = dk.merge_mean_gate(made, torch.randn(9, 12, dtype=torch.float64))
    assert max(report.difference, report.of_effect, *report.layers.values()) <= 1e-12


def test_language_model(seed: int) -> None:
    options = {"target_modules": ["q_proj", "down_proj"], "task_type": "CAUSAL_LM"}
    made = peft.get_peft_model(base(seed), dk.GoatConfig(r=2, **options))
    report = dk.merge_mean_gate(made, {"input_ids": tokens(seed, 2, 5)})
    assert len(report.layers) == 4
    assert 0 < report.difference < 1


def test_what_cannot_be_merged_is_refused(seed: int) -> None:
    x = torch.randn(9, 12, dtype=torch.float64)
    made = model(small(seed))
    dk.merge_mean_gate(made, x)
    with pytest.raises(ValueError, match="merge_mean_gate: model must be one with active GOAT layers, got a PeftModel"):
        dk.merge_mean_gate(made, x)
    made = model(small(seed))
    y = made.eval()(x)
    layer = made.get_submodule("base_model.model.first")
    kept = layer.goat_B["default"].data.clone()
    layer.goat_B["default"].data[0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="NaNs detected"):
        dk.merge_mean_gate(made, x)
    layer.goat_B["default"].data.copy_(kept)
    assert torch.equal(made(x), y)
