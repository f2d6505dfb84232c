"""accelerate() on PEFT models: PEFT's numbers, PEFT's own behaviours intact, and a report that
tells the truth.
"""

import copy
import logging
import pickle
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import Linear as LoraLinear
from peft_models import METHODS, Small, assert_close, config, model, step
from torch import Tensor, nn

import delora_kernels as dk
from delora_kernels.integrations.peft import verdict
from delora_kernels.integrations.peft.fused import layers

pytestmark = pytest.mark.oldest_peft

torch.set_num_threads(1)


@pytest.fixture
def x(seed: int) -> Tensor:
    torch.manual_seed(seed)
    return torch.randn(2, 5, 12)


@pytest.mark.parametrize("method", METHODS)
def test_parity(method: str, x: Tensor, seed: int) -> None:
    made = model(method, seed, dtype=torch.float64)
    theirs, names, state = step(made, x.double()), dict(made.named_modules()).keys(), made.state_dict()
    report = dk.accelerate(made, strict=True)
    assert [(layer.method, layer.reason) for layer in report.layers] == [(method.removeprefix("rs"), None)] * 3
    assert_close(step(made, x.double()), theirs, torch.float64)
    assert dict(made.named_modules()).keys() == names
    assert made.state_dict().keys() == state.keys()
    assert all(torch.equal(made.state_dict()[k], v) for k, v in state.items())
    assert dk.restore(made) == 3
    assert all(torch.equal(a, b) for a, b in zip(step(made, x.double()).values(), theirs.values(), strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_parity_in_half_precision(method: str, autocast: bool, dtype: torch.dtype, x: Tensor, seed: int) -> None:
    """PEFT's default: float32 adapters on a half-precision base."""
    made = model(method, seed, dtype=dtype)
    with torch.autocast("cpu", dtype, enabled=autocast):
        theirs = step(made, x.to(dtype))
        dk.accelerate(made, strict=True)
        assert_close(step(made, x.to(dtype)), theirs, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_autocast_on_a_float32_model(method: str, x: Tensor, seed: int) -> None:
    made = model(method, seed)
    with torch.autocast("cpu", torch.bfloat16):
        theirs = step(made, x)
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs, torch.bfloat16)


@pytest.mark.parametrize("method", METHODS)
def test_dropout(method: str, x: Tensor, seed: int) -> None:
    """Fresh masks in training, repeated by torch's seed and different for each layer; none in
    eval.
    """
    made = model(method, seed, dropout_p=0.4)
    made.eval()
    theirs = step(made, x)
    dk.accelerate(made, strict=True)
    assert_close(step(made, x), theirs)
    made.train()
    first, second, repeated = step(made, x, seed), step(made, x), step(made, x, seed)
    assert not torch.equal(first["y"], second["y"])
    assert all(torch.equal(first[k], repeated[k]) for k in first)
    # many masks average to the run without dropout in the first layer, which is linear
    layer, many = made.base_model.model.first, torch.ones(4000, 12)
    layer.eval()
    expected = layer(many[:1])
    layer.train()
    spread = (got := layer(many)).std(0)
    assert ((got.mean(0) - expected[0]).abs() <= 6 * spread / 4000**0.5 + 1e-5).all()
    assert spread.max() > 0


@pytest.mark.parametrize("method", METHODS)
def test_peft_behaviours(method: str, x: Tensor, seed: int, tmp_path: Path) -> None:
    """Disabling, merging, unmerging, adding, switching, deleting, saving, loading: PEFT's
    results.
    """
    if method == "dora" and peft.__version__ < "0.21":
        pytest.skip("PEFT before 0.21 can't unmerge DoRA from a Conv1D")
    made, plain = model(method, seed), model(method, seed)
    dk.accelerate(made, strict=True)

    def same() -> None:
        torch.testing.assert_close(made(x), plain(x), rtol=1e-4, atol=1e-4)

    with made.disable_adapter(), plain.disable_adapter():
        assert torch.equal(made(x), plain(x))
    same()
    for both in (made, plain):
        both.merge_adapter()
    same()
    for both in (made, plain):
        both.unmerge_adapter()
    same()
    for both in (made, plain):
        torch.manual_seed(seed + 1)
        both.add_adapter("other", config(method, r=2, target_modules=["first", "third"]))
        both.set_adapter("other")
    same()
    for both in (made, plain):
        both.set_adapter("default")
        both.delete_adapter("other")
    same()
    made.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(plain).unload(), tmp_path)
    assert dk.accelerate(loaded, strict=True).declined == ()
    torch.testing.assert_close(loaded(x), made(x))
    merged = made.merge_and_unload()
    torch.testing.assert_close(merged(x), plain.merge_and_unload()(x), rtol=1e-4, atol=1e-4)
    assert not any(isinstance(module, peft.tuners.tuners_utils.BaseTunerLayer) for module in merged.modules())


@pytest.mark.parametrize("method", METHODS)
def test_copies(method: str, x: Tensor, seed: int) -> None:
    made = model(method, seed)
    dk.accelerate(made, strict=True)
    copied, pickled = copy.deepcopy(made), pickle.loads(pickle.dumps(made))
    before = made(x)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.zero_()
    assert torch.equal(copied(x), before)
    assert torch.equal(pickled(x), before)
    assert (dk.restore(copied), dk.restore(pickled)) == (3, 3)


def test_idempotent_and_parameters_looked_up_at_each_call(x: Tensor, seed: int) -> None:
    made = model("lora", seed)
    dk.accelerate(made)
    assert str(dk.accelerate(made)) == "fused 3 of 3 adapter layers (3 lora) on the eager backend"
    layer = made.base_model.model.first
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros_like(layer.lora_B["default"].weight))
    torch.testing.assert_close(layer(x), layer.base_layer(x))
    layer.set_scale("default", 7.0)
    layer.lora_B["default"].weight = nn.Parameter(torch.ones_like(layer.lora_B["default"].weight))
    expected = layer.base_layer(x) + 7 * 5 / 3 * (x @ layer.lora_A["default"].weight.T).sum(-1, keepdim=True)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-4)


def test_trainable_base_and_bias(x: Tensor, seed: int) -> None:
    """Base weights and biases that train get PEFT's gradients."""
    for method in METHODS:
        made = model(method, seed)
        for parameter in made.parameters():
            parameter.requires_grad_()
        theirs = step(made, x)
        assert sum("base_layer" in name for name in theirs) == 5
        dk.accelerate(made, strict=True)
        assert_close(step(made, x), theirs)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_compile(method: str, x: Tensor, seed: int) -> None:
    """With a bias and without, where LoRA's scale is rsLoRA's; a Conv1D is compiled in
    test_compile.py.
    """
    torch._dynamo.reset()
    made = model(method, seed, target_modules=["first"] if method == "lora" else ["first", "third"])
    if method == "lora":
        made.add_adapter("other", config("rslora", target_modules=["third"]))
        made.base_model.set_adapter(["default", "other"])
    report = dk.accelerate(made, strict=True)
    assert len(report.fused) == 2
    theirs = step(made, x)
    assert_close(
        {
            k.removeprefix("_orig_mod."): v
            for k, v in step(torch.compile(made, backend="aot_eager", fullgraph=True), x).items()
        },
        theirs,
    )


def _replace(layer: Any, name: str) -> None:
    setattr(layer, name, nn.Sequential(getattr(layer, name)))


class OtherLinear(nn.Linear):
    pass


def _first(made: Any) -> Any:
    return made.base_model.model.first


def _integer_weight(made: Any) -> None:
    weight = nn.Parameter(torch.zeros(20, 12, dtype=torch.uint8), requires_grad=False)
    _first(made).base_layer.weight = weight


DECLINED: list[tuple[str, str, Any, str]] = [
    ("disabled", "lora", lambda m: m.base_model.disable_adapter_layers(), "its adapters are disabled"),
    ("merged", "delora", lambda m: m.merge_adapter(), "its adapter is merged"),
    ("bias", "dora", lambda m: setattr(_first(m).lora_B, "default", nn.Linear(3, 20)), "its lora_B has a bias"),
    ("hook", "dora", lambda m: _first(m).lora_A["default"].register_forward_hook(print), "lora_A has hooks"),
    ("base hook", "delora", lambda m: _first(m).base_layer.register_forward_pre_hook(print), "base layer has hooks"),
    ("patched", "lora", lambda m: setattr(_first(m).base_layer, "forward", print), "a forward of its own"),
    ("subclass", "lora", lambda m: setattr(_first(m).base_layer, "__class__", OtherLinear), "OtherLinear, not"),
    ("dropout", "delora", lambda m: _first(m).delora_dropout.update({"default": nn.AlphaDropout()}), "AlphaDropout"),
    ("cast", "lora", lambda m: setattr(_first(m), "cast_input_dtype_enabled", False), "the cast of its input"),
    ("integer", "lora", _integer_weight, "the base weight has dtype torch.uint8"),
    ("tensor scale", "lora", lambda m: _first(m).scaling.update(default=torch.tensor(2.0)), "its scaling is a Tensor"),
    ("identity hook", "delora", lambda m: _first(m).delora_dropout["default"].register_forward_hook(print), "Identity"),
    (
        "factor bias",
        "lora",
        lambda m: setattr(_first(m), "lora_A", nn.ModuleDict({"default": nn.Linear(12, 3)})),
        "a bias",
    ),
    ("owner", "lora", lambda m: _replace(_first(m).lora_A, "default"), "its lora_A is a Sequential"),
]


@pytest.mark.parametrize(("method", "change", "reason"), [c[1:] for c in DECLINED], ids=[c[0] for c in DECLINED])
def test_declined(method: str, change: Any, reason: str, seed: int) -> None:
    """Each layer that can't be fused is named with its reason; strict raises and changes
    nothing.
    """
    made = model(method, seed)
    change(made)
    with pytest.raises(RuntimeError, match="not every adapter layer can be fused") as caught:
        dk.accelerate(made, strict=True)
    assert reason in str(caught.value)
    assert not any(isinstance(module, layers.FusedLoraLinear | layers.FusedDeloraLinear) for module in made.modules())
    report = dk.accelerate(made)
    first = next(layer for layer in report.layers if layer.name.endswith("first"))
    assert reason in (first.reason or "")
    assert len(report.layers) == 3
    assert first.reason in str(report)


def test_other_layers_are_named(seed: int) -> None:
    torch.manual_seed(seed)
    base = nn.ModuleDict({"table": nn.Embedding(7, 5), "conv": nn.Conv2d(2, 3, 1), "linear": nn.Linear(5, 4)})
    made = peft.get_peft_model(base, peft.LoraConfig(target_modules=["table", "conv", "linear"]))
    report = dk.accelerate(made)
    assert {layer.name.rsplit(".", 1)[-1]: layer.reason for layer in report.layers} == {
        "table": None,
        "conv": None,
        "linear": None,
    }
    assert str(report).splitlines()[0] == "fused 3 of 3 adapter layers (3 lora) on the eager backend"


def test_falls_back_at_call_time(x: Tensor, seed: int, caplog: pytest.LogCaptureFixture) -> None:
    """What changes after accelerate() is seen at the next call, which gives PEFT's result and says
    so once.
    """
    made, plain = model("lora", seed), model("lora", seed)
    dk.accelerate(made, strict=True)
    for both in (made, plain):
        both.base_model.model.first.cast_input_dtype_enabled = False
    verdict._logged.clear()
    with caplog.at_level(logging.WARNING, logger=verdict.__name__):
        for _ in range(2):
            assert_close({"y": made(x)}, {"y": plain(x)})
    assert [r.getMessage() for r in caplog.records] == [
        "an accelerated layer runs PEFT's own forward: the cast of its input is disabled"
    ]
    handle = made.base_model.model.third.lora_B["default"].register_forward_hook(lambda *_: torch.zeros(2, 5, 9))
    assert torch.equal(
        made.base_model.model.third(torch.ones(2, 5, 14)), plain.base_model.model.third.base_layer(torch.ones(2, 5, 14))
    )
    handle.remove()


@pytest.mark.parametrize("method", METHODS)
def test_transforms_run_pefts_forward(method: str, x: Tensor, seed: int) -> None:
    """torch.func and forward-mode derivatives of an accelerated model are PEFT's."""
    made = model(method, seed, dtype=torch.float64)
    point, direction = x.double()[0], torch.ones(5, 12, dtype=torch.float64)
    transforms = [
        lambda f: torch.func.grad(lambda z: f(z).sum())(point),
        lambda f: torch.func.vmap(f)(point),
        lambda f: torch.func.jvp(f, (point,), (direction,))[1],
        lambda f: (
            torch.autograd.forward_ad.unpack_dual(f(torch.autograd.forward_ad.make_dual(point, direction))).tangent
        ),
    ]
    with torch.autograd.forward_ad.dual_level():
        theirs = transforms[-1](made)
    theirs = [transform(made) for transform in transforms[:-1]] + [theirs]
    dk.accelerate(made, strict=True)
    ours = [transform(made) for transform in transforms[:-1]]
    with torch.autograd.forward_ad.dual_level():
        ours.append(transforms[-1](made))
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_wrapped_forwards_survive_restore(x: Tensor, seed: int) -> None:
    made = model("lora", seed)
    dk.accelerate(made)
    expected = made(x)
    layer = made.base_model.model.first
    bound = layer.forward
    layer.forward = lambda *args, **kwargs: bound(*args, **kwargs)
    dk.restore(made)
    torch.testing.assert_close(made(x), expected)


def test_dora_dropout_follows_the_layers_mode(x: Tensor, seed: int) -> None:
    """Dropout modules left in training in a layer in eval: PEFT's DoRA drops nothing then, its LoRA
    does.
    """
    for method, drops in (("dora", False), ("lora", True), ("delora", True)):
        made = model(method, seed, dropout_p=0.5)
        dk.accelerate(made.eval(), strict=True)
        for module in made.modules():
            if isinstance(module, nn.Dropout):
                module.train()
        assert torch.equal(made(x), made(x)) is not drops


def test_not_a_peft_model() -> None:
    with pytest.raises(ValueError, match="model must hold PEFT adapter layers, got a Linear without any; wrap it with"):
        dk.accelerate(nn.Linear(3, 4))
    with pytest.raises(TypeError, match="model must be a torch.nn.Module, got str"):
        dk.accelerate("gpt2")  # type: ignore[arg-type]
    assert dk.restore(nn.Linear(3, 4)) == 0


def test_bare_layer_and_isinstance(x: Tensor, seed: int) -> None:
    made = model("dora", seed)
    layer = made.base_model.model.first
    assert len(dk.accelerate(layer, strict=True).layers) == 1
    assert isinstance(layer, LoraLinear)
    assert type(made.base_model.model.third) is LoraLinear
    delora = model("delora", seed)
    dk.accelerate(delora)
    assert isinstance(delora.base_model.model.first, DeloraLinear)
    assert repr(delora.base_model.model.first).startswith("delora.DeloraLinear(\n  fused by delora_kernels\n")


def test_zero_rows_of_a_dora_base(seed: int) -> None:
    """Llama checkpoints have zero rows in o_proj: PEFT gives NaN there, the fused layer the
    formula's limit.
    """
    torch.manual_seed(seed)
    base = Small(False)
    with torch.no_grad():
        base.first.weight[3] = 0
    zero_start = peft.LoraConfig(r=3, use_dora=True, target_modules=["first"])
    made = peft.get_peft_model(base, zero_start)
    assert made(torch.ones(1, 12)).isnan().any()
    dk.accelerate(made, strict=True)
    results = step(made, torch.ones(1, 12))
    assert all(value.isfinite().all() for value in results.values())
