"""weight_changes: its numbers are those of the formulas on W and on the W' that a layer's own
forward shows, for every kind of layer; what it can't tell it names, and it writes to nothing.
"""

import copy
import json
import math
from collections.abc import Callable
from typing import Any

import adapted_convolutions
import adapted_embeddings
import ether_models
import expert_models
import goat_models
import nn_modules
import own_methods
import peft
import peft_models
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import delora_kernels as dk
from delora_kernels.integrations.peft.changes import LayerChange, measure
from delora_kernels.nn import GroupedDeLoRALinear, GroupedDoRALinear, GroupedLoRALinear, MoELoRALinear

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:fan_in_fan_out is set:UserWarning")


@pytest.fixture(autouse=True)
def _few_rows_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "_CHUNK_ELEMENTS", 50)


def by_formula(W: Tensor, moved: Tensor, axis: str = "output") -> dict[str, float]:
    """Eqs. 3 and 4 as they stand, and the norms."""
    W, moved, over = W.double(), moved.double(), 1 if axis == "output" else 0
    cosine = nn.functional.cosine_similarity(moved, W, dim=over, eps=0.0)
    return {
        "magnitude": float((moved.norm(dim=over) - W.norm(dim=over)).abs().mean()),
        "direction": float((1 - cosine).mean()),
        "update_norm": float((moved - W).norm()),
        "weight_norm": float(W.norm()),
        "update": float((moved - W).norm() / W.norm()),
        "mean_length": float(W.norm(dim=over).mean()),
    }


def check(rows: list[LayerChange], weights: dict[str, tuple[Tensor, Tensor]], axis: str, limit: float) -> None:
    assert [row.label for row in rows] == list(weights)
    for row, (W, moved) in zip(rows, weights.values(), strict=True):
        for name, value in by_formula(W, moved, axis).items():
            assert getattr(row, name) == pytest.approx(value, rel=limit, abs=limit), (row.label, name)
        assert row.vectors == W.shape[0 if axis == "output" else 1]
        assert row.zero_vectors == 0


def shown(layer: Any, K: int) -> Tensor:
    """W' as a linear's own forward shows it: what it makes of the identity."""
    dtype = next(p for p in layer.parameters() if p.is_floating_point()).dtype
    with torch.no_grad():
        zero = layer(torch.zeros(1, K, dtype=dtype))
        return (layer(torch.eye(K, dtype=dtype)) - zero).t()  # type: ignore[no-any-return]


def linears(model: nn.Module) -> dict[str, tuple[Tensor, Tensor]]:
    """W and W' of every adapted linear, by its name in the base model."""
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            base: Any = layer.get_base_layer()
            W = base.weight.detach()
            W = W.t() if type(base).__name__ == "Conv1D" else W
            found[name.removeprefix("base_model.model.")] = (W, shown(layer, W.shape[1]))
    return found


def by_merging(model: Any) -> dict[str, tuple[Tensor, Tensor]]:
    """The same from what PEFT's merging writes: of convolutions, embeddings and experts."""
    merged = copy.deepcopy(model).merge_and_unload()
    found: dict[str, tuple[Tensor, Tensor]] = {}
    for name, layer in model.named_modules():
        if isinstance(layer, peft.tuners.tuners_utils.BaseTunerLayer):
            own = getattr(layer, "parameter_name", "weight")
            base: Any = layer.get_base_layer()
            key = name.removeprefix("base_model.model.").replace(".base_layer", "")
            W, moved = (getattr(each, own).detach() for each in (base, merged.get_submodule(key)))
            if isinstance(base, nn.Embedding):
                W, moved = W.t(), moved.t()
            if own == "weight":
                found[key] = (W.flatten(1), moved.flatten(1))
                continue
            for e in range(len(W)):
                pair = (W[e].t(), moved[e].t()) if base.is_transposed else (W[e], moved[e])
                found[f"{key}.{own}:{e}"] = pair
    return found


def three_adapters(seed: int) -> Any:
    """LoRA, then DoRA, which scales what LoRA gave too, then LoRA."""
    made = peft_models.model("lora", seed, dtype=torch.float64)
    made.add_adapter("other", peft_models.config("dora", target_modules=["first", "third"]))
    made.add_adapter("last", peft_models.config("lora", target_modules=["first"]))
    made.double().base_model.set_adapter(["default", "other", "last"])
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 1.7
    return made


def experts(family: str) -> Callable[[int], Any]:
    return lambda seed: expert_models.adapted(expert_models.block(family, "eager", seed), seed=seed + 1).double()


Case = tuple[Callable[[int], Any], Callable[[Any], dict[str, tuple[Tensor, Tensor]]], str]
CASES: dict[str, Case] = {
    method: (lambda seed, method=method: peft_models.model(method, seed, dtype=torch.float64), linears, method)
    for method in peft_models.METHODS
}
CASES |= {
    kind: (
        lambda seed, kind=kind: ether_models.model(ether_models.small(seed), kind),
        linears,
        "ether+" if ether_models.KINDS[kind][0] else "ether",
    )
    for kind in ("ether both", "ether+", "ether+ official")
}
CASES |= {
    "lora and dora": (three_adapters, linears, "lora + dora"),
    "convolutions": (lambda seed: adapted_convolutions.adapted("dora", seed, dtype=torch.float64), by_merging, "dora"),
    "embedding": (lambda seed: adapted_embeddings.adapted("dora", seed, dtype=torch.float64), by_merging, "dora"),
    "experts": (experts("qwen3_moe"), by_merging, "lora"),
    "experts transposed": (experts("gpt_oss"), by_merging, "lora"),
}


@pytest.mark.parametrize("case", CASES)
def test_peft_layers_by_the_formulas(case: str, seed: int) -> None:
    make, weights_of, method = CASES[case]
    model = make(seed).eval()
    weights = weights_of(model)
    if case.startswith("experts"):  # one wrapper around the other: the outer one comes first
        assert len(weights) == 2 * expert_models.E
    for axis in ("output", "input"):
        changes = dk.weight_changes(model, axis=axis)
        assert not changes.left
        check(list(changes.rows), weights, axis, 1e-9)
    methods = {row.method for row in changes.rows}
    assert methods == {method} if case != "lora and dora" else methods == {method, "lora"}
    for row in changes.rows if method == "delora" else ():
        assert row.bound == pytest.approx(3 * float(weights[row.name][0].norm(dim=0).max()), rel=1e-6)  # λ = 3
        assert 0.05 * row.bound < row.update_norm <= row.bound


@pytest.mark.parametrize("kind", ["rslora", "dora", "delora", "delora-live", "delora-paper"])
def test_own_modules_by_the_formulas_merged_or_not(kind: str, seed: int) -> None:
    torch.manual_seed(seed)
    module, linear = nn_modules.make(kind)
    weights = {"0": (linear.weight.detach(), shown(module.eval(), 14))}
    method = kind.partition("-")[0]
    for _ in ("beside the weight", "merged"):
        (row,) = dk.weight_changes(nn.Sequential(module)).rows
        check([row], weights, "output", 1e-9)
        assert (row.method, row.bound is None or row.update_norm <= row.bound) == (method, True)
        assert (row.bound is None) == (method != "delora")
        if not module.merged:
            module.merge()
    lean = copy.deepcopy(nn.Sequential(module))
    lean[0].unmerge()
    lean[0].merge(keep_weight=False)
    (left,) = dk.weight_changes(lean).left
    assert "W is gone" in left.reason
    (row,) = dk.weight_changes(lean, since={"0.weight": linear.weight}).rows
    check([row], weights, "output", 1e-9)


@pytest.mark.parametrize("kind", [GroupedLoRALinear, GroupedDoRALinear, GroupedDeLoRALinear])
def test_own_experts_by_the_formulas(kind: Any, seed: int) -> None:
    torch.manual_seed(seed)
    module = kind(6, 9, experts=3, r=2, dtype=torch.float64)
    for parameter in (p for p in module.parameters() if p.requires_grad):
        parameter.data += 0.3 * torch.randn_like(parameter)
    W = module.weight.detach().clone()
    rows = dk.weight_changes(nn.Sequential(module)).rows
    module.merge()
    weights = {f"0:{e}": (W[e], module.weight[e].detach()) for e in range(3)}
    check(list(rows), weights, "output", 1e-9)
    check(list(dk.weight_changes(nn.Sequential(module)).rows), weights, "output", 1e-9)


def test_accelerated_layers_under_autocast_are_read_the_same(seed: int) -> None:
    model = peft_models.model("dora", seed)
    before = dk.weight_changes(model)
    dk.accelerate(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert dk.weight_changes(model) == before


def test_by_hand() -> None:
    """[[3, 4], [0, 2]] becomes [[6, 8], [2, 0]]: one row doubles, one turns by a right angle."""
    linear = nn.Linear(2, 2, bias=False)
    linear.weight.data = torch.tensor([[6.0, 8.0], [2.0, 0.0]])
    start = {"weight": torch.tensor([[3.0, 4.0], [0.0, 2.0]])}
    (row,) = dk.weight_changes(linear, since=start, step=3).rows
    numbers = (row.magnitude, row.direction, row.update_norm, row.weight_norm, row.mean_length, row.update)
    assert numbers == pytest.approx((2.5, 0.5, math.sqrt(33), math.sqrt(29), 3.5, math.sqrt(33 / 29)), rel=1e-12)
    assert (row.name, row.method, row.step, row.vectors, row.zero_vectors) == ("", "full", 3, 2, 0)
    (row,) = dk.weight_changes(linear, since=start, axis="input").rows
    turned = [1 - 18 / (3 * math.sqrt(40)), 1 - 32 / (math.sqrt(20) * 8)]
    assert row.direction == pytest.approx(sum(turned) / 2, rel=1e-12)
    assert row.magnitude == pytest.approx((math.sqrt(40) - 3 + 8 - math.sqrt(20)) / 2, rel=1e-12)


def test_small_changes_keep_their_digits() -> None:
    """A turn of 1e-7 is 1 − cos = 5e-15, which 1 minus a cosine in float64 gives to one digit."""
    t, stretch = 1e-7, 1e-9
    linear = nn.Linear(3, 1, bias=False, dtype=torch.float64)
    linear.weight.data = torch.tensor([[1.0 + stretch, (1.0 + stretch) * t, 0.0]], dtype=torch.float64)
    (row,) = dk.weight_changes(linear, since={"weight": torch.tensor([[1.0, 0.0, 0.0]])}).rows
    assert row.direction == pytest.approx(t**2 / 2, rel=1e-6)
    assert row.magnitude == pytest.approx(stretch + t**2 / 2, rel=1e-6)


def test_vectors_of_length_zero_have_no_direction() -> None:
    """[0, 0] → [0, 0], [0, 0] → [3, 4], [1, 0] → [0, 1]."""
    linear = nn.Linear(2, 3, bias=False)
    linear.weight.data = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    (row,) = dk.weight_changes(linear, since={"weight": torch.tensor([[0.0, 0], [0, 0], [1, 0]])}).rows
    assert (row.zero_vectors, row.direction, row.magnitude) == (2, 1.0, pytest.approx(5 / 3))
    (row,) = dk.weight_changes(linear, since={"weight": torch.zeros(3, 2)}).rows
    assert math.isnan(row.direction)
    assert row.update == math.inf
    dora = peft.get_peft_model(nn.Sequential(nn.Linear(4, 3)), peft.LoraConfig(use_dora=True, target_modules=["0"]))
    dora.base_model.model[0].base_layer.weight.data[1] = 0
    (row,) = dk.weight_changes(dora).rows
    assert (row.zero_vectors, row.update_norm) == (1, pytest.approx(row.update_norm))
    assert math.isfinite(row.magnitude + row.direction)


def test_deloras_bound_is_reached() -> None:
    """Rank 1 on a weight whose columns are all as long: ‖ΔW‖ is λ n."""
    base = nn.Sequential(nn.Linear(4, 4, bias=False))
    base[0].weight.data = 3 * torch.eye(4)
    made = peft.get_peft_model(
        base, peft.DeloraConfig(r=1, delora_lambda=0.5, init_weights=False, target_modules=["0"])
    )
    (row,) = dk.weight_changes(made).rows
    assert (row.bound, row.update_norm) == (pytest.approx(1.5, rel=1e-6), pytest.approx(1.5, rel=1e-6))
    assert "100% of it" in str(dk.weight_changes(made))


def trained(model: nn.Module, x: Tensor) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.05)
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def test_full_fine_tuning_since_a_snapshot(seed: int) -> None:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Embedding(7, 6), nn.Linear(6, 5), nn.LayerNorm(5), nn.Linear(5, 4))
    model[3].requires_grad_(False)
    start = snapshot(model)
    trained(model, torch.arange(7))
    tables = (start["0.weight"].t(), model[0].weight.detach().t())
    weights = {"0": tables, "1": (start["1.weight"], model[1].weight.detach())}
    changes = dk.weight_changes(model, since=start)
    check(list(changes.rows), weights, "output", 1e-6)
    assert {row.method for row in changes.rows} == {"full"}
    wrapped = nn.Module()  # what DistributedDataParallel and torch.compile call what they wrap
    wrapped.module = nn.Module()
    wrapped.module._orig_mod = model
    assert dk.weight_changes(wrapped, since=start) == changes
    del start["1.weight"]
    assert [each.reason for each in dk.weight_changes(model, since=start).left] == ["1.weight is not in since"]
    with pytest.raises(ValueError, match="for full fine-tuning pass since"):
        dk.weight_changes(model[3])


class Tied(nn.Module):
    """A table that is the head's weight too; `first`: also that of a module of an unknown class."""

    def __init__(self, first: bool = False) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(7, 6), nn.Linear(6, 7, bias=False)
        self.head.weight = self.table.weight
        if first:
            self.table = nn.Module()  # type: ignore[assignment]
            self.table.weight = self.head.weight

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.head(nn.functional.embedding(x, self.table.weight))
        return y


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("names", [("table.weight",), ("head.weight",), ("table.weight", "head.weight")], ids=str)
def test_a_tied_weight_is_measured_once(names: tuple[str, ...], first: bool, seed: int) -> None:
    """Under whichever of its names the snapshot has it: one of `named_parameters`, a state dict."""
    torch.manual_seed(seed)
    model = Tied(first)
    before = model.head.weight.detach().clone()
    assert len(snapshot(model)) == 1
    trained(model, torch.arange(7))
    changes = dk.weight_changes(model, since=dict.fromkeys(names, before))
    after = model.head.weight.detach()
    weights = {"head": (before, after)} if first else {"table": (before.t(), after.t())}
    check(list(changes.rows), weights, "output", 1e-6)
    assert not changes.left
    assert [each.name for each in dk.weight_changes(model).left] == list(weights)


def test_since_compares_adapters_with_another_start(seed: int) -> None:
    """Under names with and without adapters; of merged ones too, and of what is trained whole."""
    base = peft_models.Small(False)
    start = snapshot(base)
    config = peft_models.config("lora", target_modules=["first", "third"], modules_to_save=["second"])
    model: Any = peft.get_peft_model(base, config)
    trained(model, torch.randn(5, 12))
    own = dk.weight_changes(model)
    assert [(row.name, row.method) for row in own.rows] == [("first", "lora"), ("second", "full"), ("third", "lora")]
    saved = model.base_model.model.second
    second = {"second": (start["second.weight"], saved.modules_to_save["default"].weight.detach())}
    check([own.rows[1]], second, "output", 1e-6)
    for given in (start, snapshot(model)):
        assert dk.weight_changes(model, since=given) == own
    with torch.no_grad():
        for layer in (model.base_model.model.first, model.base_model.model.third):
            layer.base_layer.weight += 0.1  # an adapter's start may change the base
    moved = linears(model)
    expected = {name: (start[f"{name}.weight"], moved[name][1]) for name in ("first", "third")}
    rows = dk.weight_changes(model, since=start).of("first", "third").rows
    check(list(rows), expected, "output", 1e-5)
    model.merge_adapter()
    assert {each.reason for each in dk.weight_changes(model).left} == {
        "its adapters are merged, and W is gone: pass since, or call unmerge_adapter() first"
    }
    check(list(dk.weight_changes(model, since=start).of("first", "third").rows), expected, "output", 1e-5)
    plain = copy.deepcopy(model).merge_and_unload().requires_grad_(False)
    check(list(dk.weight_changes(plain, since=start).of("first", "third").rows), expected, "output", 1e-5)
    start["first.weight"] = start["first.weight"].t()
    (left,) = dk.weight_changes(model, since=start).left
    assert (left.name, left.reason) == ("first", "first.weight of since is [12, 20], which is not what the layer has")


def ia3() -> Any:
    return peft.get_peft_model(
        peft_models.Small(False), peft.IA3Config(target_modules=["first"], feedforward_modules=[])
    )


def disabled() -> Any:
    model = peft_models.model("lora", 0)
    model.base_model.disable_adapter_layers()
    return model


def inactive() -> Any:
    model = peft_models.model("lora", 0)
    model.add_adapter("other", peft_models.config("lora", target_modules=["first"]))
    model.set_adapter("other")
    return model


def groups() -> Any:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, groups=2))
    return peft.get_peft_model(net, peft.LoraConfig(r=2, target_modules=["0"]))


def trains_beside() -> Any:
    model = peft_models.model("lora", 0, target_modules=["first", "third"])
    model.base_model.model.second.weight.requires_grad_()
    return model


LEFT: dict[str, tuple[Callable[[], Any], str, int]] = {
    "ia3": (ia3, "ia3.layer.Linear is not read", 1),
    "goat": (lambda: goat_models.model(goat_models.small(0)), "goat is a mixture, whose update is another", 3),
    "mixture": (lambda: nn.Sequential(MoELoRALinear(6, 4)), "a MoELoRALinear is a mixture, whose update", 1),
    "disabled": (disabled, "its adapters are disabled", 3),
    "inactive": (inactive, "it has no active adapter", 2),
    "groups": (groups, "its convolution has groups", 1),
    "trains beside": (trains_beside, "it trains, and what it was is not known: pass since", 1),
    "meta": (lambda: peft_models.model("lora", 0).to("meta"), "the weight is on the meta device", 3),
}


@pytest.mark.parametrize("case", LEFT)
def test_what_can_not_be_told_is_named(case: str) -> None:
    make, reason, count = LEFT[case]
    changes = dk.weight_changes(make())
    assert [each.reason[: len(reason)] for each in changes.left] == [reason] * count
    assert f"left out {changes.left[0].name}: {reason}" in str(changes)
    assert json.loads(json.dumps(changes.to_dict()))["left"][0]["reason"].startswith(reason)


@pytest.mark.parametrize("method", ["ether", "ether_plus"])
def test_own_methods_keep_the_weight_that_they_are_merged_into(method: str, seed: int) -> None:
    model = own_methods.adapted(method, seed)
    (before,) = dk.weight_changes(model).rows
    model.merge_adapter()
    (after,) = dk.weight_changes(model).rows
    assert after.update_norm == pytest.approx(before.update_norm, rel=1e-9)
    assert after.direction == pytest.approx(before.direction, rel=1e-9)


class Largest(TorchDispatchMode):
    """The elements of the largest tensor that an operation makes, views of its arguments aside."""

    elements = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **kwargs or {})
        given = {each.untyped_storage().data_ptr() for each in args if isinstance(each, Tensor)}
        if isinstance(out, Tensor) and out.untyped_storage().data_ptr() not in given:
            self.elements = max(self.elements, out.numel())
        return out


@pytest.mark.parametrize("method", peft_models.METHODS)
def test_a_few_rows_are_dense_at_a_time_and_nothing_is_written(method: str, seed: int) -> None:
    model = peft_models.model(method, seed)
    before = {name: (value.clone(), value._version) for name, value in model.state_dict(keep_vars=True).items()}
    with Largest() as largest:
        dk.weight_changes(model)
    assert largest.elements <= 4 * 20  # factors of rank 3, and four sums of the 20 rows; W has 240 and 280
    for name, value in model.state_dict(keep_vars=True).items():
        assert value._version == before[name][1]
        assert torch.equal(value, before[name][0])
    assert torch.is_grad_enabled()
