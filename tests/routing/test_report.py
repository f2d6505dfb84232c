"""expert_report and watch_experts: numbers, table and plot; a router biased on purpose shows dead
experts.
"""

import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import delora_kernels as dk
from delora_kernels.nn import GoatLinear, MoELoRALinear, router_parameter_groups
from delora_kernels.routing.report import ExpertReport, ExpertUse


def layer(**options: Any) -> MoELoRALinear:
    return MoELoRALinear(16, 12, **{"r": 2, "experts": 4, "dtype": torch.float64} | options)


def biased(module: Any, *never: int) -> Any:
    """Its router chooses these experts for no token whose features are positive."""
    with torch.no_grad():
        module.router.copy_(torch.rand_like(module.router))
        module.router[list(never)] = -10
    return module


def test_numbers_of_one_pass(seed: int) -> None:
    torch.manual_seed(seed)
    module = layer()
    x = torch.randn(9, 16, dtype=torch.float64)
    model = nn.Sequential(module, nn.ReLU())
    model(x)
    (use,) = dk.expert_report(model).layers
    p = (x @ module.router.T).softmax(1)
    chosen = torch.zeros_like(p).scatter(1, p.topk(2, 1).indices, 1.0)
    assert use.name == "0"
    assert use.fraction == pytest.approx(chosen.mean(0).tolist(), abs=1e-12)
    assert use.probability == pytest.approx(p.mean(0).tolist(), abs=1e-12)
    assert use.share == pytest.approx((chosen.mean(0) * 2).tolist(), abs=1e-12)
    assert use.balance == pytest.approx(float(module.stats.balance_loss("paper")), rel=1e-12)
    part = chosen.mean(0) / 2
    assert use.entropy == pytest.approx(float(-(part * part.clamp(min=1e-30).log()).sum() / math.log(4)), rel=1e-12)


@pytest.mark.parametrize(
    ("shares", "top_k", "dead", "balance", "entropy"),
    [
        ((0.5, 0.5, 0.5, 0.5), 2, (), 1.0, 1.0),
        ((1.0, 1.0, 0.0, 0.0), 2, (2, 3), 2.0, 0.5),
        ((1.0, 0.0, 0.0, 0.0), 1, (1, 2, 3), 4.0, 0.0),
    ],
)
def test_even_and_uneven(shares: Any, top_k: int, dead: Any, balance: float, entropy: float) -> None:
    use = ExpertUse("layer", shares, tuple(f / top_k for f in shares), top_k)
    assert (use.dead, use.balance, use.entropy) == (dead, pytest.approx(balance), pytest.approx(entropy))


def test_numbers_of_every_layer_for_logs() -> None:
    chosen = ExpertUse("a.b", (1.0, 0.75, 0.25, 0.0), (0.4, 0.3, 0.2, 0.1), 2, 200)
    dense = ExpertUse("c", (1.0, 1.0), (0.9, 0.1), 2, 10)
    found = ExpertReport((chosen, dense)).by_layer()
    assert {key: found[key] for key in found if "tokens" in key} == pytest.approx(
        {f"router/a.b/tokens/{e}": n for e, n in enumerate((200, 150, 50, 0))}
        | {"router/c/tokens/0": 9, "router/c/tokens/1": 1}
    )
    assert found["router/a.b/dead_experts"] == 1
    assert found["router/a.b/balance"] == pytest.approx(2 * (0.4 + 0.225 + 0.05))
    assert len(found) == 4 + 2 + 2 * 3


def test_dense_router_is_judged_by_its_probabilities() -> None:
    use = ExpertUse("layer", (1.0, 1.0), (0.999, 0.001), 2)
    assert use.share == pytest.approx((1.998, 0.002))
    assert use.dead == (1,)


def test_router_biased_on_purpose_shows_dead_experts(seed: int, tmp_path: Path) -> None:
    torch.manual_seed(seed)
    model = nn.ModuleDict({"good": layer(balance_coef=0.1), "bad": biased(layer(), 1, 3)})
    x = 0.1 + torch.rand(200, 16, dtype=torch.float64)
    with torch.no_grad():
        model["good"].router.copy_(torch.eye(4, 16))
        x[:, :4] = torch.rand(200, 4)
    for module in model.values():
        module(x)
    report = dk.expert_report(model)
    assert report.dead == (("bad", 1), ("bad", 3))
    assert report.headline == "2 of 8 experts dead in 2 layers"
    assert "bad: balance" in str(report)
    assert str(report).endswith("dead: 1, 3")
    assert report.summary()["router/dead_experts"] == 2
    balances = [use.balance for use in report.layers]
    assert report.summary()["router/balance"] == pytest.approx(sum(balances) / 2)
    rich = pytest.importorskip("rich.console")
    pytest.importorskip("matplotlib")
    console = rich.Console(width=120, record=True, file=(tmp_path / "out").open("w"))
    console.print(report.table())
    text = console.export_text()
    assert "2 of 8 experts dead" in text
    assert "1, 3" in next(line for line in text.splitlines() if "bad" in line)
    figure = report.plot(tmp_path / "experts.png")
    axes = figure.axes[0]
    assert (tmp_path / "experts.png").stat().st_size > 1000
    assert axes.images[0].get_array().shape == (2, 4)
    assert axes.images[0].get_array().data == pytest.approx(torch.tensor([use.share for use in report.layers]).numpy())
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [((1, 1), "×"), ((3, 1), "×")]


@pytest.mark.parametrize("width", [80, 120])
def test_the_table_tells_layers_apart(width: int, tmp_path: Path) -> None:
    """At 80 columns too: what all names begin with stands in the head, and shares are wrapped
    before names are.
    """
    rich = pytest.importorskip("rich.console")
    before, E = "base_model.model.model.layers", 8
    names = [f"{n}.{part}" for n in (0, 17) for part in ("self_attn.q_proj", "mlp.gate_proj", "mlp.down_proj")]
    report = ExpertReport(tuple(ExpertUse(f"{before}.{name}", (0.25,) * E, (0.125,) * E, 2) for name in names))
    console = rich.Console(width=width, record=True, file=(tmp_path / "out").open("w"))
    console.print(report.table())
    text = console.export_text()
    assert all(len(line) <= width for line in text.splitlines())
    assert all(sum(name in line for line in text.splitlines()) == 1 for name in names), text
    assert len(re.findall(r"\b1\.00\b", text)) == E * len(names)
    alone = ExpertReport(report.layers[:1])
    console.print(alone.table())
    assert " q_proj " in console.export_text()


@pytest.mark.parametrize("model", [5, None, "model"])
def test_a_report_of_no_model(model: Any) -> None:
    expected = f"expert_report: model must be an nn.Module, got {type(model).__name__}; pass the model"
    with pytest.raises(TypeError, match=expected):
        dk.expert_report(model)


def test_watch_adds_up_passes_of_different_length(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(layer(), GoatLinear.from_linear(nn.Linear(12, 12, dtype=torch.float64), 2, 3, 1))
    rows = torch.randn(20, 16, dtype=torch.float64)
    model(rows)
    whole = dk.expert_report(model)
    with dk.watch_experts(model, training=True) as watch:
        assert not watch.counted
        model(rows[:5])
        model(rows[5:].view(3, 5, 16))
        model.eval()(rows[:7])
        report = watch.report()
        watch.reset()
        with pytest.raises(ValueError, match="expert_report: model must be one whose routers have run"):
            watch.report()
    model.train()(rows)
    assert not watch.counted
    for ours, want in zip(report.layers, whole.layers, strict=True):
        assert (ours.name, ours.tokens, ours.top_k) == (want.name, 20, want.top_k)
        assert ours.fraction == pytest.approx(want.fraction, abs=1e-12)
        assert ours.probability == pytest.approx(want.probability, abs=1e-12)


def test_watch_counts_compiled_passes(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(layer())
    x = torch.randn(9, 16, dtype=torch.float64)
    with dk.watch_experts(model) as watch:
        model(x)
        want = watch.report()
        watch.reset()
        compiled = torch.compile(model, backend="aot_eager")
        for _ in range(3):
            compiled(x)
        got = watch.report()
    assert got.layers[0].tokens == 3 * want.layers[0].tokens
    assert got.layers[0].fraction == pytest.approx(want.layers[0].fraction, abs=1e-12)


def test_layers_that_did_not_route_are_left_out(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(layer(), layer())
    with pytest.raises(ValueError, match="got none that has"):
        dk.expert_report(model)
    model[0](torch.randn(3, 16, dtype=torch.float64))
    assert [use.name for use in dk.expert_report(model).layers] == ["0"]
    model[0].enabled = False
    with pytest.raises(ValueError, match="got none that has"):
        dk.expert_report(model)


def test_layers_of_different_width_share_a_heat_map() -> None:
    pytest.importorskip("matplotlib")
    uses = (ExpertUse("a", (0.5, 0.5), (0.5, 0.5), 1), ExpertUse("b", (1.0, 0.0, 0.0), (0.8, 0.1, 0.1), 1))
    shown = ExpertReport(uses).plot().axes[0].images[0].get_array()
    assert shown.shape == (2, 3)
    assert math.isnan(shown.data[0, 2])


def test_routers_have_their_own_learning_rate(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(layer(), nn.LayerNorm(12, dtype=torch.float64))
    rest, routers = router_parameter_groups(model, lr=0.0, router_lr=0.5, weight_decay=0.0)
    assert routers["params"] == [model[0].router]
    assert {id(p) for p in rest["params"]} == {id(p) for p in (model[0].A, model[0].B, *model[1].parameters())}
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW([rest, routers])
    model[0].B.data.normal_()
    before["0.B"] = model[0].B.detach().clone()
    model[0](torch.randn(6, 16, dtype=torch.float64)).square().sum().backward()
    optimizer.step()
    assert {name for name, p in model.named_parameters() if not torch.equal(p, before[name])} == {"0.router"}
    with pytest.raises(ValueError, match="router_parameter_groups: model must be a model with routers"):
        router_parameter_groups(nn.Linear(2, 2), lr=0.1, router_lr=0.1)
