"""Groups where forward passes are run again: a group, or a change of one, takes effect only where
no earlier pass can be.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from peft_pairs import check_same, gradients
from siblings import batch, model, pair, step
from torch import Tensor
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
