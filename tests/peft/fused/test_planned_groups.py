"""A planned group computes what its call does, and each thing that it was planned by, changed,
leaves the plan or the group.

The eager backend is given launches to replay, of which it has none (planned_calls.py). What a
planned group is compared with, bit for bit, is the same group with plans off, judged by plan.py.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from planned_calls import planning
from siblings import Siblings, batch, model, step
from torch import Tensor, nn
from torch.nn.modules import module as all_modules
from torch.utils._python_dispatch import TorchDispatchMode

import delora_kernels as dk
from delora_kernels import dispatch
from delora_kernels.autograd import shared_replayed
from delora_kernels.backends import tape
from delora_kernels.integrations.peft.fused import straight

METHODS = ("lora", "delora")
DTYPE = torch.bfloat16


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each planned call of a group took."""
    found: list[int] = []
    run = shared_replayed.SharedPlan.computed

    def computed(plan: Any, *given: Any) -> Any:
        found.append(len(plan.kind.options))
        return run(plan, *given)

    monkeypatch.setattr(shared_replayed.SharedPlan, "computed", computed)
    with planning():
        yield found


def group(method: str, seed: int) -> Any:
    """A model of q, k and v, whose group is planned."""
    made = model(method, seed, inner=Siblings, dtype=DTYPE)
    dk.accelerate(made, strict=True)
    for number in range(3):
        warm_up_in(made, number)
    return made


def warm_up_in(made: Any, seed: int) -> None:
    for _ in range(2):
        step(made, batch(seed, DTYPE))


def unplanned(run: Callable[[], Any]) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(straight, "enabled", False)
        patch.setattr(tape, "enabled", False)
        return run()


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype
        assert torch.equal(found[name], value), name


def linear(made: Any, name: str) -> Any:
    return getattr(made.base_model.model, name)


@pytest.mark.parametrize("method", METHODS)
def test_it_gives_the_same_bits(method: str, seed: int, taken: list[int]) -> None:
    """On tensors of the day; with gradients, without, and where one output has none."""
    made = group(method, seed)
    taken.clear()
    for parameter in made.parameters():
        parameter.data = parameter.data * 1.25
    found = step(made, batch(seed + 9, DTYPE))
    assert taken == [3]
    same(found, unplanned(lambda: step(made, batch(seed + 9, DTYPE))))

    def without_k(made: Any, x: Tensor) -> Tensor:
        made(x)  # all three are called; of k nothing is used
        return torch.cat([linear(made, "q")(x), linear(made, "k")(x).detach(), linear(made, "v")(x)], dim=-1)

    taken.clear()
    for _ in range(5):
        found = step(made, batch(seed + 9, DTYPE), without_k)
    assert set(taken) == {3}
    same(found, unplanned(lambda: step(made, batch(seed + 9, DTYPE), without_k)))
    taken.clear()
    with torch.no_grad():
        made(batch(seed + 9, DTYPE))
        for _ in range(4):
            y = made(batch(seed + 9, DTYPE))
        assert 3 in taken
        assert torch.equal(y, unplanned(lambda: made(batch(seed + 9, DTYPE))))


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_for_backward_is_the_same(method: str, seed: int, taken: list[int]) -> None:
    made, kept = group(method, seed), []
    taken.clear()

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.shape, tensor.dtype, tensor.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step(made, batch(seed, DTYPE))
        planned, kept = kept, []
        unplanned(lambda: step(made, batch(seed, DTYPE)))
    assert taken == [3]
    assert planned == kept != []


def _frozen(made: Any) -> None:
    for name, parameter in linear(made, "k").named_parameters():
        if name.endswith(("A.default", "A.default.weight")):
            parameter.requires_grad_(False)


def _moved(change: Callable[[Tensor], Tensor]) -> Callable[[Any], Any]:
    def moved(made: Any) -> None:
        base = linear(made, "k").base_layer
        base.weight = nn.Parameter(change(base.weight.detach()), requires_grad=False)

    return moved


@contextmanager
def _globally_hooked() -> Iterator[None]:
    handle = all_modules.register_module_forward_hook(lambda *_: None)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _in_tf32() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def _no_backend() -> Iterator[None]:
    before, dispatch._requested = dispatch._requested, None
    try:
        yield
    finally:
        dispatch._requested = before


class _Dispatches(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


def _factors_in_float32(made: Any) -> None:
    for name, parameter in made.named_parameters():
        if "base_layer" not in name:
            parameter.data = parameter.data.float()


CHANGES: dict[str, Callable[[Any], Any]] = {
    "requires_grad": _frozen,
    "dtype": _factors_in_float32,
    "device": _moved(lambda weight: weight.to("meta")),
    "strides": _moved(lambda weight: weight.t().contiguous().t()),
    "storage offset": _moved(lambda w: torch.cat([w.new_zeros(1), w.flatten()])[1:].view(w.shape)),
    "a hook on a member": lambda made: linear(made, "v").register_forward_hook(lambda *_: None),
    "a hook inside a member": lambda made: linear(made, "v").base_layer.register_forward_hook(lambda *_: None),
    "a scale": lambda made: linear(made, "q").scaling.update(default=0.375),
    "a member switched off": lambda made: linear(made, "k").enable_adapters(False),
}
SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "a hook of all modules": _globally_hooked,
    "matmul precision": _in_tf32,
    "no backend asked for": _no_backend,
    "a dispatch mode": _Dispatches,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


def attempt(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("name", CHANGES)
@pytest.mark.parametrize("method", METHODS)
def test_a_change_leaves_the_plan(method: str, name: str, seed: int, taken: list[int]) -> None:
    if name == "a scale" and method == "delora":
        return
    made = group(method, seed)
    assert taken[-1] == 3
    taken.clear()
    CHANGES[name](made)
    found = attempt(lambda: step(made, batch(seed + 9, DTYPE)))
    assert taken == []
    if name == "device":
        return  # a layer without numbers gives none
    expected = unplanned(lambda: attempt(lambda: step(made, batch(seed + 9, DTYPE))))
    same(found, expected) if isinstance(expected, dict) else None
    assert isinstance(expected, dict) or found == expected


@pytest.mark.parametrize("name", SURROUNDINGS)
@pytest.mark.parametrize("method", METHODS)
def test_other_surroundings_leave_the_plan(method: str, name: str, seed: int, taken: list[int]) -> None:
    made = group(method, seed)
    if name == "matmul precision":  # which matters where something is float32
        _factors_in_float32(made)
        for number in range(3):
            warm_up_in(made, number)
    taken.clear()
    with SURROUNDINGS[name]():
        found = step(made, batch(seed + 9, DTYPE))
        assert taken == []
        same(found, unplanned(lambda: step(made, batch(seed + 9, DTYPE))))


@pytest.mark.parametrize("method", METHODS)
def test_deterministic_mode(method: str, seed: int, taken: list[int]) -> None:
    """Nothing that is planned is chosen by it: what is replayed asks torch for it itself."""
    made = group(method, seed)
    expected = step(made, batch(seed + 9, DTYPE))
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        same(step(made, batch(seed + 9, DTYPE)), expected)
        same(unplanned(lambda: step(made, batch(seed + 9, DTYPE))), expected)
    finally:
        torch.use_deterministic_algorithms(before)


def test_plans_of_single_calls_leave_a_group_whole(seed: int, taken: list[int]) -> None:
    """Layers of the same kinds that run alone are planned, too: how a call ran is its place's to
    say, for its recomputation.
    """
    alone = model("lora", seed, inner=Siblings, dtype=DTYPE)
    dk.accelerate(alone, group=False)
    for number in range(4):
        warm_up_in(alone, number)
    assert taken == []
    made = group("lora", seed)
    taken.clear()
    step(made, batch(seed, DTYPE))
    assert taken == [3]


def test_batched_and_second_gradients(seed: int, taken: list[int]) -> None:
    made = group("lora", seed)
    taken.clear()
    leaves = [parameter for parameter in made.parameters() if parameter.requires_grad]

    def run() -> list[Tensor]:
        y = made(batch(seed, DTYPE).requires_grad_())
        two = torch.stack([torch.ones_like(y)] * 2)
        found = [*torch.autograd.grad(y, leaves, two, retain_graph=True, is_grads_batched=True)]
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), create_graph=True)
        found += [grad.detach() for grad in grads]
        with pytest.raises(RuntimeError, match="second derivative"):
            grads[0].sum().backward()
        return found

    ours = run()
    assert taken == [3]
    for got, expected in zip(ours, unplanned(run), strict=True):
        assert torch.equal(got, expected)
