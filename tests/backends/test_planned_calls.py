"""A planned call computes and keeps what the call does that it stands for.

The eager backend is given launches to replay, of which it has none: its calls of torch are replayed
with real numbers. What it is compared with, bit for bit, is the same call with plans switched off.
"""

import gc
import threading
import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from planned_calls import METHODS, K, N, R, T, draw, forward, learn, outcome, same, unplanned
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from delora_kernels import functional as F
from delora_kernels.backends import eager, tape

pytestmark = pytest.mark.usefixtures("plans")


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
