"""Each thing that a call was planned by, changed, leaves the plan; what is refused, is refused as
before.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from call_surroundings import Seeing, SeeingFunctions, in_tf32
from planned_calls import Derived, K, T, draw, forward, learn, outcome, same, unplanned
from torch import Tensor

from delora_kernels.autograd import replayed
from delora_kernels.functional import planned

pytestmark = pytest.mark.usefixtures("plans")


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
        "the negative bit": becomes("x", lambda x: torch._neg_view(-x)),
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


def test_a_gradient_with_the_negative_bit_is_not_replayed(
    seed: int, taken: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    learn("lora", seed)
    by_stages, whole = [], replayed.Plan._gradients_by_stages

    def seen(*given: Any) -> Any:
        by_stages.append(given)
        return whole(*given)

    monkeypatch.setattr(replayed.Plan, "_gradients_by_stages", seen)
    made = draw("lora", seed + 9)
    dy = torch.randn(forward("lora", made).shape).bfloat16()
    found = [torch.autograd.grad(forward("lora", made), made["A"], each) for each in (dy, torch._neg_view(-dy))]
    assert len(by_stages) == 1
    same(list(found[0]), list(found[1]))


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
