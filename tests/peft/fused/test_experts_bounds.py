"""Adapters on experts that are not exactly what has been read: they run PEFT's own forward, right
as ever, and the report says why.
"""

import ast
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import expert_models as em
import peft
import pytest
import torch
from expert_models import Block, adapted, assert_close, block, routed, step
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

import delora_kernels as dk
from delora_kernels.integrations.peft.fused import experts as fused_experts
from delora_kernels.integrations.peft.fused import experts_known, layer_check, verdicts


def outer_of(model: Any) -> Any:
    return model.base_model.model.experts


def _hook(module: nn.Module) -> None:
    module.register_forward_hook(lambda module, args, y: 2 * y)


def _patched(module: Any) -> None:
    own = module.forward
    module.forward = lambda *args, **kwargs: 2 * own(*args, **kwargs)


def _other_linear(model: Any) -> None:
    class Wrapped(nn.Linear):
        pass

    outer_of(model).lora_A["default"].__class__ = Wrapped


def _variant(model: Any) -> None:
    outer_of(model).lora_variant["default"] = object()


def _duplicate(model: Any) -> None:
    outer_of(model).parameter_name = "gate_up_proj"


def _subclass(model: Any) -> None:
    """Somebody's own forward on top of the known one."""
    experts = outer_of(model).get_base_layer()

    class Mine(type(experts)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return 2 * super().forward(*args, **kwargs)

    experts.__class__ = Mine


def _registered(model: Any) -> None:
    """An implementation that the user has registered."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

    if "mine" not in ALL_EXPERTS_FUNCTIONS:
        ALL_EXPERTS_FUNCTIONS.register("mine", lambda *args, **kwargs: 2 * grouped_mm_experts_forward(*args, **kwargs))
    outer_of(model).get_base_layer().config._experts_implementation_internal = "mine"


CHANGES: dict[str, tuple[Callable[[Any], None], str]] = {
    "hook on the inner wrapper": (lambda m: _hook(outer_of(m).base_layer), "the wrapper inside it has hooks"),
    "hook on the experts": (lambda m: _hook(outer_of(m).get_base_layer()), "the experts module has hooks"),
    "patched outer wrapper": (lambda m: _patched(outer_of(m)), "it has a forward of its own"),
    "patched inner wrapper": (lambda m: _patched(outer_of(m).base_layer), "inside it has a forward of its own"),
    "patched experts": (lambda m: _patched(outer_of(m).get_base_layer()), "experts module has a forward of its own"),
    "another linear": (_other_linear, "its lora_A is a Wrapped"),
    "a variant": (_variant, "more than a pair of factors"),
    "a forward of its own": (_subclass, "no experts module of Transformers that is known"),
    "an implementation of the user's": (_registered, "its experts implementation is 'mine', which is not known"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_peft_runs_what_is_not_known(change: str, seed: int) -> None:
    """Changed after accelerate(), too: each call sees it."""
    make, text = CHANGES[change]
    models = [adapted(block(seed=seed), seed=seed + 1) for _ in range(2)]
    assert len(dk.accelerate(models[1], strict=True).fused) == 2
    inputs = routed(9, seed)
    plain = step(models[0], inputs, trained=False)["y"]
    for model in models:
        make(model)
    report = dk.accelerate(models[1])
    assert [text in str(layer.reason) for layer in report.layers] == [True, True], report
    with pytest.raises(RuntimeError, match="not every adapter layer can be fused"):
        dk.accelerate(models[1], strict=True)
    ours, theirs = (step(model, inputs) for model in (models[1], models[0]))
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    if "linear" not in change and "variant" not in change:
        assert_close({"y": theirs["y"]}, {"y": 2 * plain}, limit=1e-6)


def test_hooks_on_the_outermost_wrapper_run(seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    _hook(outer_of(model))
    inputs = routed(9, seed)
    theirs = step(model, inputs)
    assert len(dk.accelerate(model).fused) == 2
    assert_close(step(model, inputs), theirs)


def test_hooks_for_all_modules(seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    seen = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(type(module).__name__))
    try:
        dk.accelerate(model)
        step(model, routed(9, seed))
    finally:
        handle.remove()
    assert "Qwen3MoeExperts" in "".join(seen)


@pytest.mark.parametrize("name", ["_activate_lora", "get_delta_factors", "forward"])
def test_a_replaced_method_of_peft_runs(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = adapted(block(seed=seed), seed=seed + 1), []
    own = getattr(ParamWrapper, name)

    def replaced(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return own(self, *args, **kwargs)

    monkeypatch.setattr(ParamWrapper, name, replaced)
    report = dk.accelerate(model)
    assert all(f"ParamWrapper.{name} has been replaced" in str(layer.reason) for layer in report.layers)
    step(model, routed(9, seed))
    assert calls


class _Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.linear(x)
        return y


def test_a_parameter_of_two_dimensions(seed: int) -> None:
    """Of a linear, and of the experts beside their weights."""
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["linear.weight"], init_lora_weights=False)
    model: Any = peft.get_peft_model(_Small(), config)
    x = torch.randn(3, 6)
    theirs = model(x)
    report = dk.accelerate(model)
    assert "no experts module of Transformers that is known" in str(report.layers[0].reason)
    assert torch.equal(model(x), theirs)

    model = adapted(block("gpt_oss", seed=seed), ("down_proj", "gate_up_proj_bias"), seed=seed + 1)
    inputs = routed(9, seed)
    theirs = step(model, inputs)
    report = dk.accelerate(model)
    assert all("gate_up_proj_bias is no weight of the experts" in str(layer.reason) for layer in report.layers)
    ours = step(model, inputs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_one_expert_is_pefts_own_affair(seed: int) -> None:
    model = adapted(block("qwen3_moe", "eager", seed, num_experts=1), seed=seed + 1)
    x, _, weights = routed(9, seed, k=1, experts=3)
    inputs = x, torch.zeros(9, 1, dtype=torch.long), weights
    theirs = step(model, inputs)
    assert dk.accelerate(model).fused == ()
    assert all(torch.equal(step(model, inputs)[name], value) for name, value in theirs.items())


def test_forms_of_a_call(seed: int) -> None:
    """By keyword; and what the block does not take goes to PEFT, errors too."""
    model = adapted(block(seed=seed), seed=seed + 1)
    x, chosen, weights = routed(9, seed)
    outer, expected = outer_of(model), model(x, chosen, weights)
    dk.accelerate(model, strict=True)
    with _pefts(outer) as calls:
        assert_close({"y": outer(x, chosen, top_k_weights=weights)}, {"y": expected})
        assert_close({"y": outer(x, top_k_weights=weights, top_k_index=chosen)}, {"y": expected})
        assert calls == []
        wrongs = [(x, chosen), (x, chosen, weights, 1), (x[None], chosen, weights), (x, chosen, weights[:-1])]
        for wrong in (*wrongs, (x[:, 1:], chosen, weights)):
            with pytest.raises((TypeError, RuntimeError, IndexError)):
                outer(*wrong)
        assert len(calls) == 5


@contextmanager
def _pefts(outer: Any) -> Iterator[list[Any]]:
    """The calls that PEFT's own forward makes to what the wrapper wraps."""
    calls: list[Any] = []
    handle = outer.get_base_layer().register_forward_pre_hook(lambda module, args: calls.append(args))
    handle.remove()
    own = ParamWrapper._activate_lora

    def activate(self: Any, *args: Any) -> Any:
        if self is outer:
            calls.append(args)
        return own(self, *args)

    defined = fused_experts._DEFINED
    before = defined["_activate_lora"]
    ParamWrapper._activate_lora = activate
    defined["_activate_lora"] = activate
    try:
        yield calls
    finally:
        ParamWrapper._activate_lora = own
        defined["_activate_lora"] = before


def test_every_known_forward_is_read_whole(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """One statement more or less is another fingerprint; layout, comments, annotations are not."""

    def first(self: Any, x: int) -> int:
        """Text."""
        # a comment
        return self.scale * (x
                             + 1)  # fmt: skip

    def second(self, x):  # type: ignore[no-untyped-def]
        return self.scale * (x + 1)

    def third(self: Any, x: int) -> int:
        return self.scale * (x + 2)  # type: ignore[no-any-return]

    assert experts_known.fingerprint(first) == experts_known.fingerprint(second) != experts_known.fingerprint(third)
    assert experts_known.fingerprint(eval("lambda self, x: x")) == ""
    model = adapted(block("mixtral", "eager", seed), seed=seed + 1)
    assert len(dk.accelerate(model).fused) == 2
    monkeypatch.setattr(experts_known, "READ", {})
    assert "the eager forward of mixtral.modeling_mixtral.MixtralExperts is not known" in str(dk.accelerate(model))


def test_families_of_the_installed_transformers() -> None:
    """Of its experts classes, those whose eager forward has been read."""
    transformers = pytest.importorskip("transformers", "5")
    forwards: dict[str, str] = {}
    for file in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        source = file.read_text(encoding="utf-8")
        if "\n@use_experts_implementation" not in source:
            continue
        for kind in ast.parse(source).body:
            if isinstance(kind, ast.ClassDef) and "use_experts_implementation" in map(_name, kind.decorator_list):
                own = {each.name: each for each in kind.body if isinstance(each, ast.FunctionDef)}
                forwards[kind.name] = experts_known.fingerprint_of(own["forward"])
    unknown = {name for name, forward in forwards.items() if forward not in experts_known.READ}
    print(f"{len(forwards) - len(unknown)} of {len(forwards)}, not {sorted(unknown)}")
    families = {em.FAMILIES[family][0] for family in em.FAMILIES}
    assert families <= forwards.keys() - unknown
    if transformers.__version__.startswith("5.23."):
        assert (len(forwards), unknown) == (65, {"OpenAIPrivacyFilterExperts"})  # which computes in float32


def _name(decorator: ast.expr) -> str:
    return ast.unparse(decorator.func if isinstance(decorator, ast.Call) else decorator)


def test_an_untested_peft(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    model = adapted(block(seed=seed), seed=seed + 1)
    against = layer_check._against_experts("99.0")
    assert layer_check._against_experts("0.21.2") == []
    monkeypatch.setattr(verdicts, "against_experts", against)
    assert "PEFT 99.0 is newer than the tested 0.21.2: its factors of experts" in str(dk.accelerate(model))


def test_a_wrapper_inside_one_that_peft_runs(seed: int) -> None:
    """The module is parametrized then: the inner wrapper leaves it alone."""
    model = adapted(block(seed=seed), seed=seed + 1)
    inputs = routed(9, seed)
    theirs = step(model, inputs)
    dk.accelerate(model, strict=True)
    outer = outer_of(model)
    outer.__class__ = ParamWrapper
    ours = step(model, inputs)
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())
    assert isinstance(outer.base_layer, fused_experts.FusedParamWrapper)


def test_blocks_are_named_in_reports(seed: int) -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = block(seed=seed), block(seed=seed + 1)

    made: Any = Two()
    config = peft.LoraConfig(r=2, target_modules=[], target_parameters=["experts.down_proj"])
    model = peft.get_peft_model(made, config)
    _hook(model.base_model.model.second.experts.get_base_layer())
    report = dk.accelerate(model)
    assert [layer.method for layer in report.layers] == ["expert lora"] * 2
    assert [layer.fused for layer in report.layers] == [True, False]
    assert "1 expert lora" in str(report)
    assert isinstance(made.first, Block)
    assert em.E == 5
