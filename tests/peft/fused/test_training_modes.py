"""Accelerated PEFT models in what a training loop does by hand: scaling, accumulation, autocast,
checkpointing.
"""

from contextlib import ExitStack
from typing import Any

import pytest
import torch
from peft_models import METHODS, assert_close, model, step
from torch import Tensor

import delora_kernels as dk

torch.set_num_threads(1)


def pair(method: str, seed: int, **options: Any) -> tuple[Any, Any]:
    """An accelerated model and its twin with PEFT's own layers."""
    fused, eager = model(method, seed, **options), model(method, seed, **options)
    dk.accelerate(fused, strict=True)
    return fused, eager


def inputs(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def grads(made: Any) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("dtype", [torch.float16, None], ids=["float16 autocast", "no autocast"])
@pytest.mark.parametrize("method", METHODS)
def test_grad_scaler(method: str, dtype: torch.dtype | None, seed: int) -> None:
    """Scaled gradients, a step skipped for infinities, and the scale that follows are PEFT's."""
    xs = inputs(seed, 4, 6, 12)
    xs[1, 2, 3] = torch.inf
    runs = []
    for made in pair(method, seed):
        scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=2)
        parameters = [p for p in made.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(parameters, lr=1e-3)
        seen, scales = [], []
        for x in xs:
            before = [p.detach().clone() for p in parameters]
            with torch.autocast("cpu", dtype or torch.float16, enabled=dtype is not None):
                loss = made(x).float().square().mean()
            scaler.scale(loss).backward()
            seen.append(grads(made))  # scaled
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            scales.append(scaler.get_scale())
            skipped = all(torch.equal(p, was) for p, was in zip(parameters, before, strict=True))
            assert skipped is not x.isfinite().all().item()
        runs.append((seen, scales))
    (ours, our_scales), (theirs, their_scales) = runs
    assert our_scales == their_scales == [64.0, 32.0, 32.0, 64.0]
    for index in (0, 2, 3):
        assert_close(ours[index], theirs[index], dtype or torch.float32)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("method", METHODS)
def test_accumulation(method: str, set_to_none: bool, seed: int) -> None:
    """Three backward passes add up to the gradient of their sum, twice, into the tensors that are
    there.
    """
    fused, eager = pair(method, seed, dtype=torch.float64)
    for turn in range(2):
        parts = inputs(seed + turn, 3, 4, 12).double()
        before = {name: p.grad for name, p in fused.named_parameters()}
        for made in (fused, eager):
            made.zero_grad(set_to_none=set_to_none)
        for part in parts:
            fused(part).square().sum().backward()
        eager(parts).square().sum().backward()
        assert_close(grads(fused), grads(eager), torch.float64)
        if turn and not set_to_none:
            assert all(p.grad is before[name] for name, p in fused.named_parameters())


AUTOCASTS: dict[str, list[torch.dtype | None]] = {
    "disabled": [None],
    "enabled": [torch.bfloat16],
    "disabled inside": [torch.bfloat16, None],
    "enabled inside": [None, torch.float16],
    "another inside": [torch.float16, torch.bfloat16],
}


@pytest.mark.parametrize("around_backward", [True, False], ids=["around backward", "around forward"])
@pytest.mark.parametrize("contexts", AUTOCASTS.values(), ids=AUTOCASTS)
@pytest.mark.parametrize("method", METHODS)
def test_nested_autocast(method: str, contexts: list[torch.dtype | None], around_backward: bool, seed: int) -> None:
    """The innermost autocast decides, wherever backward runs: PEFT's numbers and dtypes."""
    results = []
    for made in pair(method, seed):
        x = inputs(seed, 5, 12).requires_grad_()
        with ExitStack() as stack:
            for dtype in contexts:
                stack.enter_context(torch.autocast("cpu", dtype or torch.bfloat16, enabled=dtype is not None))
            y = made(x)
            if around_backward:
                y.float().square().sum().backward()
        if not around_backward:
            y.float().square().sum().backward()
        assert x.grad is not None
        results.append({"y": y.detach(), "x": x.grad} | grads(made))
    assert_close(*results, contexts[-1] or torch.float32)


@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
@pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_checkpointing_with_dropout(method: str, reentrant: bool, autocast: bool, seed: int) -> None:
    """The masks that backward draws again are forward's: the bits of the run without checkpoints of
    the same seed.
    """
    transformers = pytest.importorskip("transformers")
    if transformers.__version__ < "5":
        pytest.skip("models of Transformers 4 round elsewhere in a checkpoint, adapted or not")
    from tiny_llama import llama, tokens

    results, batch = [], tokens(seed, 2, 9)
    for checkpointing in (False, True):
        made = llama(method, seed, dropout_p=0.3)
        dk.accelerate(made, strict=True)
        made.enable_input_require_grads()
        if checkpointing:
            made.gradient_checkpointing_enable({"use_reentrant": reentrant})
        torch.manual_seed(seed)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = made(input_ids=batch, labels=batch).loss
        loss.backward()
        results.append({"loss": loss.detach()} | grads(made))
    plain, checkpointed = results
    assert plain.keys() == checkpointed.keys()
    assert [name for name in plain if not torch.equal(plain[name], checkpointed[name])] == []
    torch.manual_seed(seed + 1)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        assert made(input_ids=batch, labels=batch).loss != plain["loss"]  # there is dropout


@pytest.mark.parametrize("method", METHODS)
def test_frozen_and_shared_gradients(method: str, seed: int) -> None:
    """Adapters whose requires_grad changes between steps, and one layer run twice in a step."""
    fused, eager = pair(method, seed, dtype=torch.float64)
    x = inputs(seed, 4, 12).double()
    for made in (fused, eager):
        for parameter in made.base_model.model.second.parameters():
            parameter.requires_grad_(False)
    assert_close(step(fused, x), step(eager, x), torch.float64)
    for made in (fused, eager):
        for name, parameter in made.base_model.model.second.named_parameters():
            parameter.requires_grad_("base_layer" not in name)
        first = made.base_model.model.first
        made.zero_grad()
        (first(x).square().sum() + first(x + 1).sum()).backward()
    assert_close(grads(fused), grads(eager), torch.float64)
