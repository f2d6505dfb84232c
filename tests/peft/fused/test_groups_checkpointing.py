"""Groups where forward passes are run again: a group, or a change of one, takes effect only where
no earlier pass can be.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft_pairs import check_same, gradients
from siblings import K, batch, model, pair, step
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts
from torch.utils.flop_counter import FlopCounterMode

import delora_kernels as dk

METHODS = ("lora", "dora", "delora")


def _each(made: Any, x: Tensor, reentrant: bool, **options: Any) -> Tensor:
    for block in made.base_model.model:
        x = checkpoint(block, x, use_reentrant=reentrant, **options)
    return x


def _selective() -> Any:
    return create_selective_checkpoint_contexts(
        lambda _, op, *args, **kwargs: (
            CheckpointPolicy.MUST_SAVE if op is torch.ops.aten.mm.default else CheckpointPolicy.PREFER_RECOMPUTE
        )
    )


CHECKPOINTING: dict[str, Callable[[Any, Tensor], Tensor]] = {
    "reentrant": lambda made, x: _each(made, x, True),
    "not reentrant": lambda made, x: _each(made, x, False),
    "selective": lambda made, x: _each(made, x, False, context_fn=_selective),
    "whole": lambda made, x: checkpoint(made, x, use_reentrant=False),
}


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", CHECKPOINTING)
def test_checkpointing(kind: str, method: str, seed: int, shared: list[int]) -> None:
    """From the very first step, with two forward passes before two backward passes; then with one
    forward pass of the old way still to be run again, when the groups are known.
    """
    made, plain = model(method, seed, blocks=2), model(method, seed, blocks=2)
    report = dk.accelerate(made)
    forward = CHECKPOINTING[kind]
    for number in range(3):
        results = []
        for each in (made, plain):
            each.zero_grad(set_to_none=True)
            xs = [batch(seed + i).requires_grad_() for i in range(2)]
            ys = [forward(each, x) for x in xs]
            ys[1].square().sum().backward()
            third = forward(each, xs[1].detach().requires_grad_())
            ys[0].sum().backward()
            third.sin().sum().backward()
            results.append({"0": xs[0].grad, "1": xs[1].grad} | gradients(each))
        check_same(*results, 1e-12)
        assert number == 0 or kind == "selective" or len(report.groups) == 4
    assert bool(shared) is (kind != "selective")


@pytest.mark.parametrize("method", ["lora", "delora"])
@pytest.mark.parametrize("what", ["dropout", "bfloat16", "autocast", "backend"])
def test_calls_that_are_planned(what: str, method: str, seed: int, planned: list[int], shared: list[int]) -> None:
    """Dropout, another dtype, autocast and a backend that was asked for: as alone, with the same
    masks.
    """
    dtype = {"dropout": torch.float64, "backend": torch.float64, "bfloat16": torch.bfloat16}.get(what, torch.float32)
    tolerance = 1e-12 if dtype == torch.float64 else 16 * torch.finfo(torch.bfloat16).eps
    options = {"dtype": dtype, "dropout_p": 0.25 if what == "dropout" else 0.0}
    made, alone = (model(method, seed, blocks=2, **options) for _ in range(2))
    report = dk.accelerate(made)
    dk.accelerate(alone, group=False)
    for forward in (None, CHECKPOINTING["not reentrant"], CHECKPOINTING["reentrant"]):
        for _ in range(2):
            results = []
            for each in (made, alone):
                torch.manual_seed(seed)
                cast = torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast")
                with cast, dk.use_backend("eager") if what == "backend" else nullcontext():
                    results.append(step(each, batch(seed, dtype), forward))
            check_same(*results, tolerance)
    assert len(report.groups) == 4
    assert shared == []
    assert set(planned) == {2, 3}


def test_a_counter_in_forward_alone(seed: int, shared: list[int]) -> None:
    """A forward pass that a mode made run alone is run again alone, the mode gone."""
    made, plain, _ = pair("lora", seed)
    shared.clear()
    results = []
    for each in (made, plain):
        x = batch(seed).requires_grad_()
        with FlopCounterMode(display=False):
            y = _each(each, x, False)
        y.square().sum().backward()
        results.append({"x": x.grad} | gradients(each))
    check_same(*results, 1e-12)
    assert shared == []
    del y
    step(made, batch(seed))
    assert shared == [3, 2]


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", ["reentrant", "not reentrant"])
def test_a_reference_pass_beside(kind: str, method: str, first: bool, seed: int, shared: list[int]) -> None:
    """Preference training: a pass without gradients and adapters, before or after the one whose
    backward pass runs it again; it holds no group back.
    """
    made, plain = model(method, seed), model(method, seed)
    report = dk.accelerate(made)
    for _ in range(4):
        results = []
        for each in (made, plain):
            each.zero_grad(set_to_none=True)
            x, reference = batch(seed).requires_grad_(), torch.zeros(())
            shared.clear()
            for policy in (not first, first):
                if policy:
                    y = CHECKPOINTING[kind](each, x)
                else:
                    with torch.no_grad(), each.disable_adapter():
                        reference = CHECKPOINTING[kind](each, x)
            (y - reference).square().sum().backward()
            results.append({"x": x.grad, "reference": reference} | gradients(each))
            if each is made:
                ran = list(shared)
        check_same(*results, 1e-12)
    assert len(report.groups) == 2
    assert ran == [3, 2, 3, 2]


class Uneven(nn.Module):
    """q, k, v, which do not always share x."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = nn.Linear(K, K), nn.Linear(K, K), nn.Linear(K, K)

    def forward(self, x: Tensor, how: str) -> Tensor:
        q = self.q(2 * x if how == "leader's own x" else x)
        with torch.no_grad() if how == "without gradients" else nullcontext():
            k = self.k(x)
        if how == "twice":
            k = k * self.k(x)
        y: Tensor = q + k * self.v(x.clone() if how == "a sibling's own x" else x)
        return y


@pytest.mark.parametrize("method", METHODS)
def test_siblings_that_run_alone_beside_their_group(method: str, seed: int) -> None:
    """A call of all, then one of a sibling alone: the same when the pass is run again."""
    options: dict[str, Any] = {"inner": Uneven}
    for how in ("leader's own x", "a sibling's own x", "twice", "without gradients"):
        made, plain = model(method, seed, **options), model(method, seed, **options)
        dk.accelerate(made)
        for _ in range(2):
            made(batch(seed), "as one").sum().backward()
        for _ in range(2):
            results = []
            for each in (made, plain):
                each.zero_grad(set_to_none=True)
                x = batch(seed).requires_grad_()
                y = checkpoint(each, x, how, use_reentrant=False)
                y.square().sum().backward()
                results.append({"x": x.grad, "y": y.detach()} | gradients(each))
            check_same(*results, 1e-12)


@pytest.mark.parametrize("method", METHODS)
def test_same_bits(method: str, seed: int) -> None:
    """With gradients and without, and in the recomputation of a checkpoint."""
    made, _, _ = pair(method, seed)
    x = batch(seed)
    with torch.no_grad():
        exact = made(x)
    assert torch.equal(made(x), exact)
    outputs: list[Tensor] = []
    made.base_model.model[0].attention.o.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach()))
    checkpoint(made, x, use_reentrant=True).sum()
    checkpoint(made, x.requires_grad_(), use_reentrant=False).sum().backward()
    assert len(outputs) == 3
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[1], outputs[2])
