"""What is found for a layer at one look is what plan.py finds, argument for argument, or nothing;
and a planned call that is found so gives what the judged one gives.

The eager backend is given launches to replay, of which it has none (planned_calls.py): its calls of
torch are replayed with real numbers. What they are compared with is the same call judged by plan.py
with plans off.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from call_surroundings import Seeing, SeeingFunctions, in_tf32
from layer_changes import LEFT, REGISTERS
from peft.tuners.lora import dora as peft_dora
from straight_layers import METHODS, K, T, layer_of, outcome, same
from torch import Tensor, nn
from torch.nn.modules import module as all_modules

from delora_kernels.backends import tape
from delora_kernels.integrations.peft.fused import layers, straight, verdicts
from delora_kernels.integrations.peft.fused.one_call import PlannedRun
from delora_kernels.integrations.peft.fused.plan import verdict_of

DTYPE = torch.bfloat16


def drawn(seed: int, dtype: torch.dtype = DTYPE) -> Tensor:
    return torch.randn(2, T // 2, K, generator=torch.Generator().manual_seed(seed + 1)).to(dtype)


def made(method: str, seed: int, **options: Any) -> Any:
    """A layer in bfloat16 whose factors are float32."""
    layer = layer_of(method, seed, DTYPE, **options)
    for name, parameter in layer.named_parameters():
        if "base_layer" not in name:
            parameter.data = parameter.data.float()
    return layer


def parts(run: Any) -> tuple[Any, ...]:
    """What x → y is made of, tensors by identity."""
    held = run.arguments if isinstance(run, PlannedRun) else run.keywords
    named = {name: id(value) if isinstance(value, Tensor) else value for name, value in held.items()}
    function = (run.function, run.make, run.keeps_dtype) if isinstance(run, PlannedRun) else run.func
    return function, named


def judged(layer: Any, x: Tensor) -> Any:
    """What plan.py finds for a call."""
    _, _, fused = verdict_of(layer)
    return None if fused is None or layers._why_not_call(layer, fused, x, (), {}) is not None else fused


def check_found(layer: Any, x: Tensor) -> bool:
    """What is found at one look is what plan.py finds; whether anything is."""
    found = type(layer).read_run(layer, x)
    if found is None:
        return False
    expected = judged(layer, x)
    assert isinstance(found, partial) == isinstance(expected, partial)
    assert parts(found) == parts(expected)
    return True


def twice(layer: Any, x: Tensor, context: Callable[[], Any] = nullcontext) -> tuple[dict[str, Any], dict[str, Any]]:
    """The outcome by plans, and by plan.py with plans off."""
    ours = outcome(layer, x, context())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straight, "enabled", False)
        patch.setattr(tape, "enabled", False)
        return ours, outcome(layer, x, context())


def learn(layer: Any, x: Tensor, context: Callable[[], Any] = nullcontext) -> None:
    for _ in range(4):
        outcome(layer, x, context())


def autocast() -> Any:
    return torch.autocast("cpu", torch.bfloat16)


AROUND: dict[str, tuple[Callable[[], Any], torch.dtype]] = {
    "plain": (nullcontext, DTYPE),
    "autocast": (autocast, DTYPE),
    "autocast of float32": (autocast, torch.float32),  # in which PEFT's DeLoRA gives y back
    "no_grad": (torch.no_grad, DTYPE),
}


@pytest.mark.parametrize("name", AROUND)
@pytest.mark.parametrize("method", METHODS)
def test_a_planned_call_is_found_without_plan(
    method: str, name: str, seed: int, by_plan: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    around, dtype = AROUND[name]
    layer, x = made(method, seed).to(dtype), drawn(seed, dtype)
    learn(layer, x, around)
    for name, parameter in layer.named_parameters():  # numbers are of the day
        parameter.data = parameter.data * 1.25 if "base_layer" in name else parameter.data + 0.125
    with monkeypatch.context() as patch:
        patch.setattr(layers, "verdict_of", None)
        before = len(by_plan)
        ours = outcome(layer, x, around())
        assert by_plan[before:] == [f"{method}_linear"]
    same(ours, twice(layer, x, around)[1])


@pytest.mark.parametrize("context", [nullcontext, autocast])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_found_of_a_usual_layer(
    method: str, dtype: torch.dtype, context: Callable[[], Any], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a CPU and no backend asked for, too: it only need not be judged anew."""
    layer = layer_of(method, seed, dtype)
    with context():
        assert check_found(layer, drawn(seed, dtype))
        other = torch.float32 if dtype != torch.float32 else torch.float16
        assert check_found(layer, drawn(seed, other)) is (context is autocast and dtype != torch.float64)
    layer.set_adapter(["other"])
    assert check_found(layer, drawn(seed, dtype))
    layer.base_layer.bias = None
    assert check_found(layer, drawn(seed, dtype))
    monkeypatch.setattr(straight, "enabled", False)
    assert not check_found(layer, drawn(seed, dtype))


NO_CHANGE = ("all in bfloat16", "magnitude kept elsewhere", "lora_bias")
"""What all is in, where plan.py does not look, and a flag with no bias behind it: its own call is
the planned one.
"""


ONCE = [each for each in LEFT if not each[1].endswith((" pre-hook", " backward hook"))]
"""Of hooks one kind: all four are one question of look.py, which test_straight.py asks."""


@pytest.mark.parametrize(("method", "name", "change"), ONCE, ids=[f"{method}-{name}" for method, name, _ in ONCE])
def test_a_change_is_seen(method: str, name: str, change: Callable[[Any], Any], seed: int, by_plan: list[str]) -> None:
    """By the look itself, or by the plan's key; results and errors are those of plan.py."""
    layer, x = layer_of(method, seed, DTYPE), drawn(seed)
    learn(layer, x)
    assert len(by_plan) == 1
    change(layer)
    for dtype in (torch.float64, torch.float32, DTYPE):
        check_found(layer, x.to(dtype))
    same(*twice(layer, x))
    assert len(by_plan) == 1 + (name in NO_CHANGE)


CONTEXTS: dict[str, Callable[[], Any]] = {
    "function mode": SeeingFunctions,
    "dispatch mode": Seeing,
    "autocast": autocast,
    "tf32": in_tf32,
    "no_grad": torch.no_grad,
    "forward-mode level": torch.autograd.forward_ad.dual_level,
}


@pytest.mark.parametrize("context", CONTEXTS.values(), ids=CONTEXTS.keys())
@pytest.mark.parametrize("method", METHODS)
def test_other_surroundings(method: str, context: Callable[[], Any], seed: int, by_plan: list[str]) -> None:
    layer, x = made(method, seed), drawn(seed)
    learn(layer, x)
    by_plan.clear()
    same(*twice(layer, x, context))
    assert by_plan == []
    with context():
        check_found(layer, x)


@pytest.mark.parametrize("method", METHODS)
def test_what_the_input_is(method: str, seed: int, by_plan: list[str]) -> None:
    """One token without a dimension, another dtype, another width, other layouts, subclasses."""
    layer, x = made(method, seed), drawn(seed)
    learn(layer, x)
    by_plan.clear()
    subclass = x[0].as_subclass(type("Marked", (Tensor,), {}))
    nested = torch.nested.nested_tensor([x[0], x[0, :1]])
    cut = x[..., :-1].contiguous()
    for given in (x[0, 0], x.float(), x.half(), cut, subclass, x[0].to_sparse(), nested, x[0].to("meta"), x[:, :0]):
        check_found(layer, given)
        ours, theirs = twice(layer, given)
        if given.is_nested or given.is_meta or "y" not in theirs:
            assert (ours.keys(), ours.get("error")) == (theirs.keys(), theirs.get("error"))
        else:
            same(ours, theirs)
    assert by_plan == []


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_of_the_bare_function_is_not_that_of_a_layer_that_refuses(
    method: str, seed: int, by_plan: list[str]
) -> None:
    """x of another dtype than the base is for PEFT's own forward, whatever the function takes."""
    layer, x = made(method, seed), drawn(seed, torch.float32)
    found = type(layer).read_run(layer, drawn(seed))
    held = found.arguments if isinstance(found, PlannedRun) else found.keywords
    function = found.function if isinstance(found, PlannedRun) else found.func
    for _ in range(4):
        try:
            function(x.clone().requires_grad_(), **held).sum().backward()
        except (TypeError, ValueError, RuntimeError):
            break
    by_plan.clear()
    ours, theirs = twice(layer, x)
    same(ours, theirs)
    assert by_plan == []


@pytest.mark.parametrize("method", METHODS)
def test_dropout(method: str, seed: int, by_plan: list[str]) -> None:
    """Found where nothing drops; the draws are those of plan.py's call."""
    layer, x = made(method, seed, dropout_p=0.5), drawn(seed)
    learn(layer.eval(), x)
    assert len(by_plan) == 1
    layer.train()
    assert not check_found(layer, x)
    same(*twice(layer, x))
    next(module for name, module in layer.named_modules() if name.endswith("dropout.default")).p = 0.0
    assert check_found(layer, x)


@pytest.mark.parametrize("register", REGISTERS)
@pytest.mark.parametrize("method", METHODS)
def test_hooks_of_all_modules(method: str, register: str, seed: int, by_plan: list[str]) -> None:
    layer, x = made(method, seed), drawn(seed)
    learn(layer, x)
    by_plan.clear()
    handle = getattr(all_modules, register)(lambda *_: None)
    try:
        assert not check_found(layer, x)
        same(*twice(layer, x))
    finally:
        handle.remove()
    assert by_plan == []


@pytest.mark.parametrize("method", METHODS)
def test_replaced_methods_and_an_untested_peft(
    method: str, seed: int, by_plan: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, x = made(method, seed).eval(), drawn(seed)
    learn(layer, x)
    by_plan.clear()
    replaced: list[tuple[Any, str]] = [(nn.Linear, "forward"), (nn.Identity, "forward")]
    replaced += [(peft_dora.DoraLinearLayer, "get_weight_norm")] if method == "dora" else []
    for kind, name in replaced:
        defined = getattr(kind, name)
        with monkeypatch.context() as patch:
            patch.setattr(kind, name, lambda self, *a, defined=defined, **k: 2 * defined(self, *a, **k))
            assert not check_found(layer, x)
            same(*twice(layer, x))
    with monkeypatch.context() as patch:
        patch.setitem(verdicts.reasons, method, "untested")
        assert not check_found(layer, x)
        same(*twice(layer, x))
    assert by_plan == []


@pytest.mark.parametrize("method", METHODS)
def test_tensors_that_lie_otherwise(method: str, seed: int, by_plan: list[str]) -> None:
    """Other strides, another place in their storage, the same object given other memory."""
    layer, x = made(method, seed), drawn(seed)
    learn(layer, x)
    by_plan.clear()
    for parameter in [each for name, each in layer.named_parameters() if "other" not in name]:
        kept = parameter.data
        if kept.dim() == 2:
            parameter.data = kept.t().contiguous().t()
            same(*twice(layer, x))
        parameter.data = torch.cat([kept.new_zeros(1), kept.flatten()])[1:].view(kept.shape)
        same(*twice(layer, x))
        parameter.data = kept
    assert by_plan == []
    same(*twice(layer, x))
    assert len(by_plan) == 1
