"""DoRA is trained by every form of optimiser beside PEFT: nothing that a layer computed from A, B
or m is used again after they changed, however they were changed.

A version counter does not tell: fused optimisers, writes through `.data` and through raw memory
leave it as it is.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_count import counted
from peft_pairs import F64, batch, check_same, gradients, pair
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

STEPS, RATE, EPS = 4, 0.05, 1e-3
TOLERANCE = 10 * STEPS * RATE / EPS * F64
"""AdamW turns the rounding of a gradient near 0 into RATE / EPS times as much, in each step; what
the layers make of it stays within ten times that. A step itself moves parameters by RATE.
"""
Update = Callable[[], None]


def trained(made: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in made.parameters() if parameter.requires_grad]


def optimiser(kind: Any, **options: Any) -> Callable[[nn.Module], Update]:
    """An optimiser of torch's."""
    return lambda made: kind(trained(made), lr=RATE, **options).step


def through_data(made: nn.Module) -> Update:
    """Gradient descent by writes that autograd does not see."""

    def update() -> None:
        for parameter in trained(made):
            assert parameter.grad is not None
            parameter.data.sub_(parameter.grad, alpha=RATE)

    return update


def by_replaced_data(made: nn.Module) -> Update:
    """New memory for each parameter at each step, as FSDP's gathers give it."""

    def update() -> None:
        for parameter in trained(made):
            assert parameter.grad is not None
            parameter.data = parameter.data - RATE * parameter.grad

    return update


def in_one_buffer(made: nn.Module) -> Update:
    """Parameters are views of one buffer, which is written as raw memory: no version moves."""
    parameters = trained(made)
    flat = torch.cat([parameter.detach().flatten() for parameter in parameters])
    first = 0
    for parameter in parameters:
        parameter.data = flat[first : first + parameter.numel()].view(parameter.shape)
        first += parameter.numel()
    memory = flat.numpy()

    def update() -> None:
        versions = [parameter._version for parameter in parameters]
        grads = [parameter.grad.flatten() for parameter in parameters if parameter.grad is not None]
        memory[:] -= RATE * torch.cat(grads).numpy()
        assert versions == [parameter._version for parameter in parameters]

    return update


UPDATES: dict[str, Callable[[nn.Module], Update]] = {
    f"{kind.__name__} {form}": optimiser(kind, **options)
    for kind, own in ((torch.optim.AdamW, {"eps": EPS}), (torch.optim.SGD, {}))
    for form, options in (
        ("loop", {"foreach": False, "fused": False, **own}),
        ("foreach", {"foreach": True, **own}),
        ("fused", {"fused": True, **own}),
    )
}
UPDATES |= {"through .data": through_data, "replaced .data": by_replaced_data, "one buffer": in_one_buffer}


def accumulate(made: nn.Module, seed: int, forward: Callable[[nn.Module, Tensor], Tensor]) -> list[Tensor]:
    """Outputs of two passes, whose gradients add up."""
    made.zero_grad(set_to_none=True)
    outputs = [forward(made, batch(seed + i).requires_grad_()) for i in range(2)]
    for y in outputs:  # both forward passes come before a backward pass
        y.square().sum().backward()
    return [y.detach() for y in outputs]


PASSES: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "plain": lambda made, x: made(x),
    "checkpoint": lambda made, x: checkpoint(made, x, use_reentrant=False),
    "reentrant checkpoint": lambda made, x: checkpoint(made, x, use_reentrant=True),
}


@pytest.mark.parametrize("name", UPDATES)
def test_dora_learns_as_in_peft(name: str, seed: int) -> None:
    """Outputs, gradients and parameters of every step, with accumulation, without and with
    recomputed forward passes.
    """
    made, plain = pair("dora", seed)
    updates = [UPDATES[name](model) for model in (made, plain)]
    for i in range(STEPS):
        forward = list(PASSES.values())[i % len(PASSES)]
        with counted() as passes:
            ours = accumulate(made, seed + 10 * i, forward)
        assert len(passes) == (6 if i % len(PASSES) == 0 else 12)  # three layers; a recomputed pass is one more
        theirs = accumulate(plain, seed + 10 * i, forward)
        check_same({f"y {j}": y for j, y in enumerate(ours)}, {f"y {j}": y for j, y in enumerate(theirs)}, TOLERANCE)
        check_same(gradients(made), gradients(plain), TOLERANCE)
        before = [parameter.detach().clone() for parameter in trained(made)]
        for update in updates:
            update()
        assert all(not torch.equal(old, new) for old, new in zip(before, trained(made), strict=True))
        check_same(*(dict(model.named_parameters()) for model in (made, plain)), TOLERANCE)
