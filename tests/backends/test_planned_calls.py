"""A planned call computes, keeps and refuses what the call does that it stands for; each thing that
it was planned by, changed, leaves the plan.

The eager backend is given launches to replay, of which it has none: its calls of torch are replayed
with real numbers. What it is compared with, bit for bit, is the same call with plans switched off.
"""

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.autograd import replayed
from delora_kernels.backends import eager, tape
from delora_kernels.functional import planned

T, K, N, R = 6, 24, 40, 4
METHODS = ("lora", "dora", "delora")


class Derived(torch.nn.Parameter):
    """A tensor that might do more."""


@pytest.fixture(autouse=True)
def _plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(eager, "begin", lambda device: 0, raising=False)
    monkeypatch.setattr(tape, "_known", {})
    monkeypatch.setattr(tape, "calls", {})
    with use_backend("eager"):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans by which calls ran."""
    found: list[Any] = []
    real = replayed.Plan.computed

    def computed(plan: Any, *given: Any) -> Any:
        found.append(plan)
        return real(plan, *given)

    monkeypatch.setattr(replayed.Plan, "computed", computed)
    return found


def draw(method: str, seed: int, lead: tuple[int, ...] = (2, T // 2), **but: Any) -> dict[str, Any]:
    """bfloat16 with float32 factors, everything but W trained."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.bfloat16
    made: dict[str, Any] = {"x": drawn(*lead, K, dtype=wide), "weight": drawn(N, K, dtype=wide)}
    made |= {"bias": drawn(N, dtype=wide), "A": drawn(R, K), "B": drawn(N, R)}
    if method == "dora":
        made["magnitude"] = drawn(N).abs()
    if method == "delora":
        made |= {"lam": drawn(1), "weight_norm": drawn(K).abs()}
    else:
        made["scale"] = 0.5
    for name in ("x", "bias", "A", "B", "magnitude", "lam"):
        if name in made:
            made[name].requires_grad_()
    return made | but


def forward(method: str, made: dict[str, Any]) -> Tensor:
    y: Tensor = getattr(F, f"{method}_linear")(**made)
    return y


def outcome(method: str, made: dict[str, Any], y: Tensor | None = None) -> list[Tensor]:
    """y and every gradient."""
    y = forward(method, made) if y is None else y
    leaves = [value for value in made.values() if isinstance(value, Tensor) and value.requires_grad]
    if not y.requires_grad:
        return [y]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def unplanned(run: Callable[[], Any]) -> Any:
    tape.enabled, before = False, tape.enabled
    try:
        return run()
    finally:
        tape.enabled = before


def learn(method: str, seed: int, **options: Any) -> None:
    for i in range(4):
        outcome(method, draw(method, seed + i, **options))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("lead", [(T,), (2, T // 2)], ids=["rows", "batch"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("around", ["plain", "autocast", "no_grad"])
def test_it_gives_the_same_bits(method: str, lead: tuple[int, ...], around: str, seed: int, taken: list[Any]) -> None:
    """y and every gradient; in the dtypes and shapes of the call, on tensors of the day."""

    def context() -> Any:
        if around == "autocast":
            return torch.autocast("cpu", torch.bfloat16)
        return torch.no_grad() if around == "no_grad" else nullcontext()

    with context():
        learn(method, seed, lead=lead)
        assert len(taken) == 1
        made = draw(method, seed + 9, lead=lead)
        found = outcome(method, made)
        assert len(taken) == 2
        same(found, unplanned(lambda: outcome(method, made)))
        assert len(taken) == 2
    assert found[0].shape == (*lead, N)


def changes() -> dict[str, Callable[[dict[str, Any]], dict[str, Any]]]:
    """What a plan is found by, of the arguments → the same with that alone changed."""

    def becomes(name: str, make: Callable[[Tensor], Tensor]) -> Callable[[dict[str, Any]], dict[str, Any]]:
        return lambda made: made | {name: make(made[name].detach()).requires_grad_(made[name].requires_grad)}

    return {
        "a shape": becomes("x", lambda x: x[:1].clone()),
        "a rank": lambda made: made | {"A": made["A"].detach()[:3], "B": made["B"].detach()[:, :3]},
        "strides of x": becomes("x", lambda x: x.transpose(0, 1).contiguous().transpose(0, 1)),
        "strides of W": lambda made: made | {"weight": made["weight"].t().contiguous().t()},
        "strides of B": becomes("B", lambda B: B.t().contiguous().t()),
        "a dtype": becomes("A", lambda A: A.bfloat16()),
        "the layout": lambda made: made | {"A": made["A"].detach().to_sparse()},
        "a class": becomes("B", Derived),
        "a frozen factor": lambda made: made | {"A": made["A"].detach()},
        "a frozen x": lambda made: made | {"x": made["x"].detach()},
        "a trained W": lambda made: made | {"weight": made["weight"].detach().requires_grad_()},
        "no bias": lambda made: made | {"bias": None},
        "the scale": lambda made: made | {"scale": 0.25},
        "a scale that is no float": lambda made: made | {"scale": True},
        "dropout": lambda made: made | {"dropout_p": 0.5, "seed": 3},
        "another device": lambda made: made | {"weight": made["weight"].to("meta")},
    }


def attempt(run: Callable[[], Any]) -> Any:
    try:
        return run()
    except (TypeError, ValueError, RuntimeError) as error:
        return type(error), str(error)


@pytest.mark.parametrize("what", changes())
def test_it_is_left_for_every_other_argument(what: str, seed: int, taken: list[Any]) -> None:
    learn("lora", seed)
    taken.clear()
    made = changes()[what](draw("lora", seed + 9))
    found = attempt(lambda: outcome("lora", made))
    assert taken == []
    expected = unplanned(lambda: attempt(lambda: outcome("lora", made)))
    same(found, expected) if isinstance(expected, list) else None
    assert isinstance(expected, list) or found == expected


@pytest.mark.parametrize("given", [{"scale": True}, {"dropout_p": False}], ids=["scale", "dropout_p"])
def test_what_equals_a_number_is_still_refused(given: dict[str, Any], seed: int) -> None:
    """True is 1.0 to a dictionary, and no scale."""
    for _ in range(4):
        outcome("lora", draw("lora", seed, scale=1.0, dropout_p=0.0))
    with pytest.raises(TypeError, match=f"{next(iter(given))} must be a number"):
        forward("lora", draw("lora", seed, scale=1.0) | given)


@contextmanager
def in_tf32() -> Iterator[None]:
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        yield
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before


class Seeing(TorchDispatchMode):
    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


class SeeingFunctions(TorchFunctionMode):
    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return function(*args, **(kwargs or {}))


SURROUNDINGS: dict[str, Callable[[], Any]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "no_grad": torch.no_grad,
    "tf32": in_tf32,
    "a dispatch mode": Seeing,
    "a function mode": SeeingFunctions,
    "no backend asked for": lambda: pytest.MonkeyPatch.context(),
}


@pytest.mark.parametrize("what", SURROUNDINGS)
def test_it_is_left_in_other_surroundings(what: str, seed: int, taken: list[Any]) -> None:
    learn("lora", seed)
    taken.clear()
    made = draw("lora", seed + 9)
    with SURROUNDINGS[what]() as context:
        if what == "no backend asked for":
            context.setattr("delora_kernels.dispatch._requested", None)
        found = outcome("lora", made)
        assert taken == []
        same(found, unplanned(lambda: outcome("lora", made)))


def test_a_transform_is_refused_as_ever(seed: int) -> None:
    learn("lora", seed)
    made = draw("lora", seed + 9)
    with pytest.raises(RuntimeError, match="does not support torch.func transforms"):
        torch.func.vmap(lambda x: forward("lora", made | {"x": x}))(made["x"].detach())


@pytest.mark.parametrize("method", METHODS)
def test_what_is_kept_for_backward_is_the_same(method: str, seed: int, taken: list[Any]) -> None:
    """So that checkpointing may run a call one way forward and the other again."""
    learn(method, seed)
    made, kept = draw(method, seed + 9), []

    def keep(tensor: Tensor) -> Tensor:
        kept.append((tensor.shape, tensor.dtype, tensor.stride()))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outcome(method, made)
        planned, kept = kept, []
        unplanned(lambda: outcome(method, made))
    assert planned == kept != []
    leaves = [value for value in made.values() if isinstance(value, Tensor) and value.requires_grad]
    expected = torch.autograd.grad(forward(method, made).float().sum(), leaves)
    y = checkpoint(lambda: forward(method, made), use_reentrant=False)  # planned forward, and not again
    found = unplanned(lambda: torch.autograd.grad(y.float().sum(), leaves))
    same(list(found), list(expected))


def test_content_is_of_the_day(seed: int, taken: list[Any]) -> None:
    """Written into between calls, in ways that versions show and in ways that they don't."""
    made = draw("dora", seed)
    for i in range(7):
        taken.clear()
        if i % 2:
            made["A"].data = made["A"].data * 1.5
        else:
            made["B"].detach().mul_(0.5)
        made["weight"] += 1
        found = outcome("dora", made)
        assert len(taken) == (i > 2)
        same(found, unplanned(lambda: outcome("dora", made)))


def test_backward_that_asks_for_more(seed: int, taken: list[Any]) -> None:
    """dy of other strides, the graph kept, batched gradients; a second derivative is refused."""
    learn("lora", seed)
    made = draw("lora", seed + 9)
    leaves = [made[name] for name in ("x", "A", "B")]
    y = forward("lora", made)
    assert len(taken) == 2
    dy = torch.randn(3, *y.shape, generator=torch.Generator().manual_seed(seed)).to(y.dtype)
    plain = unplanned(lambda: forward("lora", made))
    for each in (dy[0], dy[0].transpose(0, 1).contiguous().transpose(0, 1), dy[0, :1, :1, :1].expand(y.shape)):
        for _ in range(5):
            found, expected = (torch.autograd.grad(out, leaves, each, retain_graph=True) for out in (y, plain))
            same(list(found), list(expected))
    assert len(taken[-1].backward) == 2  # as rows, the first two are laid out alike
    batched = torch.autograd.grad(y, leaves, dy, is_grads_batched=True, retain_graph=True)
    for place in range(3):
        one = torch.autograd.grad(y, leaves, dy[place], retain_graph=True)
        for all_of, alone in zip(batched, one, strict=True):
            limit = 4 * torch.finfo(alone.dtype).eps * float(alone.abs().max())
            assert (all_of[place] - alone).abs().max() <= limit
    dx = torch.autograd.grad(y, leaves, dy[0], create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()


def test_its_output_is_a_tensor_of_its_own(seed: int, taken: list[Any]) -> None:
    """A consumer may write into it, or into what it came from, and autograd sees both."""
    learn("lora", seed)
    made = draw("lora", seed + 9)
    y = forward("lora", made)
    y += 1
    y.mul_(2)
    plain = unplanned(lambda: forward("lora", made))
    found = [torch.autograd.grad(out, made["A"], torch.ones_like(out))[0] for out in (y, (plain + 1) * 2)]
    same(found[:1], found[1:])
    y = forward("lora", made)
    with torch.no_grad():
        made["x"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_an_output_kept_for_backward_is_seen_when_written_into(seed: int, taken: list[Any]) -> None:
    made = draw("dora", seed, saved="output", bias=None)
    for _ in range(5):
        expected = outcome("dora", made)
    assert len(taken) == 2
    same(expected, unplanned(lambda: outcome("dora", made)))
    y = forward("dora", made)
    y.detach().add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_nothing_is_kept_of_a_call(seed: int, taken: list[Any]) -> None:
    refs = []
    for i in range(6):
        made = draw("delora", seed + i)
        found = outcome("delora", made)
        refs += [weakref.ref(each) for each in (*made.values(), *found) if isinstance(each, Tensor)]
    del made, found
    gc.collect()
    assert [ref for ref in refs if ref() is not None] == []


def test_no_plans(seed: int, taken: list[Any]) -> None:
    unplanned(lambda: learn("lora", seed))
    assert (tape.calls, tape._known, taken) == ({}, {}, [])


def test_plans_are_bounded(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "MOST", 8)
    for tokens in range(1, 12):
        learn("lora", seed, lead=(tokens,))
        assert len(tape.calls) <= 8


def test_states_live_side_by_side(seed: int, taken: list[Any]) -> None:
    """Reference and policy passes, four adapters, lengths in turn: nothing is recorded twice."""
    adapters = [draw("lora", seed + i, scale=0.5 + i) for i in range(4)]
    lengths = [draw("lora", seed, lead=(tokens,))["x"] for tokens in torch.randperm(60)[:20].add(1).tolist()]

    def epoch() -> None:
        for x in lengths:
            for adapter in adapters:
                outcome("lora", adapter | {"x": x})
            with torch.no_grad():
                forward("lora", adapters[0] | {"x": x})

    for _ in range(4):
        epoch()
    known, calls = dict(tape._known), dict(tape.calls)
    taken.clear()
    epoch()
    assert len(taken) == len(lengths) * 5
    assert (known, calls) == (tape._known, tape.calls)
    assert all(tape.calls[key] is plan for key, plan in calls.items())


def test_threads(seed: int) -> None:
    errors: list[BaseException] = []
    draws = [draw("lora", seed + i, lead=(1 + i % 3,)) for i in range(6)]
    expected = [unplanned(lambda made=made: outcome("lora", made)) for made in draws]

    def work() -> None:
        try:
            for i in range(48):
                same(outcome("lora", draws[i % 6]), expected[i % 6])
        except BaseException as error:
            errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []


def test_linears_of_one_x_are_replayed(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward pass, with an output that nobody asks for; on tensors of the day."""

    def run(draw_seed: int, last: int = 3) -> list[Tensor]:
        made = [draw("lora", draw_seed + i) for i in range(3)]
        x, leaves = made[0]["x"], [made[0]["x"], *(each[name] for each in made[:last] for name in ("A", "B"))]
        given = [[each[name] for each in made] for name in ("weight", "A", "B")]
        ys = F.lora_linears(x, *given, scale=[0.5, 0.25, 2.0])[:last]
        return [*ys, *torch.autograd.grad(ys, leaves, [torch.ones_like(y) for y in ys])]

    for last in (3, 2):
        for i in range(4):
            run(seed + 10 * i, last)
        known = dict(tape._known)
        assert [type(each) for each in known.values()] == [tuple] * (2 if last == 3 else 3)
        with monkeypatch.context() as patch:
            patch.setattr(eager, "project", None)  # what is replayed asks for no op
            found = run(seed + 99, last)
        same(found, unplanned(lambda last=last: run(seed + 99, last)))
        assert known == tape._known


@pytest.mark.parametrize("lead", [(), (1,), (2, 3), (2, 1, 3)])
@pytest.mark.parametrize("function", [*METHODS, "scale as an integer", "moe", "one expert", "ether"])
def test_leading_dimensions_are_those_of_x(function: str, lead: tuple[int, ...], seed: int) -> None:
    """A token alone, and rows of several dimensions, at every coming of a kind."""

    def call(number: int) -> Tensor:
        made = draw(function if function in METHODS else "lora", seed + number, lead)
        if function in METHODS:
            return forward(function, made)
        if function == "scale as an integer":
            return forward("lora", made | {"scale": 2})
        x, W, A, B = (made[name] for name in ("x", "weight", "A", "B"))
        if function == "ether":
            return F.ether_linear(x, W, A.detach().view(4 * R, K // 4)[:4])
        count = 1 if function == "one expert" else 2
        experts = (torch.stack([each] * count) for each in (A, B))
        y, _ = F.moe_lora_linear(x, W, *experts, A[:count].detach(), top_k=1)
        return y

    for number in range(6):
        y = call(number)
        assert y.shape == (*lead, N)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tape, "enabled", False)
            assert torch.equal(y, call(number))


def test_where_a_tensor_begins_in_its_storage_is_looked_at(seed: int, taken: list[Any]) -> None:
    """What its alignment hangs on, by which a library's product takes it as it is or copied."""
    made = draw("lora", seed, (T,))
    for _ in range(4):
        forward("lora", made)
    del taken[:]
    x = made["x"].detach()
    buffer = torch.cat([x.new_zeros(1), x.flatten()])
    forward("lora", made | {"x": buffer[1:].view(T, K).requires_grad_()})
    assert not taken
    forward("lora", made)
    assert len(taken) == 1


@pytest.mark.parametrize("scale", [0.5, 2])
def test_tf32_where_no_tensor_is_float32(
    scale: float, seed: int, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Factors in float16 beside a base in bfloat16 are multiplied in float32."""
    made = draw("lora", seed, (T,), scale=scale)
    made |= {name: made[name].detach().half().requires_grad_() for name in ("A", "B")}
    for _ in range(4):
        forward("lora", made)
    del taken[:]
    monkeypatch.setattr(planned, "allow_tf32", lambda: True)
    forward("lora", made)
    assert not taken
