"""Siblings that share an input run as one call: the same numbers as alone, fewer reads, and alone
wherever something does not fit.
"""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft_pairs import check_same, gradients
from siblings import K, Siblings, batch, model, pair, step, warm_up
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

import delora_kernels as dk

METHODS = ("lora", "dora", "delora")


BLOCK = "base_model.model.0"


FOUND = (tuple(f"{BLOCK}.attention.{name}" for name in "qkv"), (f"{BLOCK}.gate", f"{BLOCK}.up"))


@pytest.mark.parametrize("method", METHODS)
def test_numbers_of_groups(method: str, seed: int, shared: list[int]) -> None:
    """float64 to 1e-12: outputs, dx and every factor's gradient, from the first step on."""
    made, plain = model(method, seed), model(method, seed)
    report = dk.accelerate(made, strict=True)
    theirs = step(plain, batch(seed))
    for number in range(3):
        check_same(step(made, batch(seed)), theirs, 1e-12)
        assert shared == [3, 2] * number
    assert report.groups == FOUND
    assert pickle.loads(pickle.dumps(report)).groups == FOUND
    assert str(report).endswith("  share an input, and run as one call: q + k + v (1), gate + up (1)")


@pytest.mark.parametrize("method", METHODS)
def test_rounding_of_groups(method: str, seed: int) -> None:
    """In float32 a group is as exact as its layers are one by one."""
    ratios = []
    for number in range(12):
        exact = step(model(method, seed + number), batch(seed + number))
        errors = []
        for group in (True, False):
            made = model(method, seed + number, dtype=torch.float32)
            dk.accelerate(made, group=group)
            made(batch(0, torch.float32)).sum().backward()
            found = step(made, batch(seed + number, torch.float32))
            errors.append(torch.stack([(found[name].double() - value).norm() for name, value in exact.items()]))
        ratios.append((errors[0] / errors[1]).log())
    # over 200 seeds the mean over a model's tensors and 12 models has a standard deviation of 0.03
    assert torch.stack(ratios).mean().exp() < 1.15


def test_one_model_of_every_method(seed: int, shared: list[int]) -> None:
    """Ranks, scales and methods differ inside a group; a trained bias or base leaves it."""
    made = model("lora", seed)
    made.add_adapter("other", model("dora", seed).peft_config["default"])
    plain = copy.deepcopy(made)
    dk.accelerate(made)
    for each in (made, plain):
        each.base_model.model[0].attention.k.set_adapter("other")
        each.base_model.model[0].attention.v.scaling["default"] = 0.3
    warm_up(made)
    check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    assert shared[-2:] == [3, 2]
    for each in (made, plain):
        each.base_model.model[0].attention.v.base_layer.weight.requires_grad_()
    shared.clear()
    check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    assert shared == [2]


def _products(made: nn.Module, x: Tensor) -> tuple[int, int, int]:
    """How many products and sums of the forward and the backward pass read something of x's
    shape.
    """
    counts = []
    x = x.detach().requires_grad_()
    y = x
    for backward in (False, True):
        with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
            y = y.sum().backward() if backward else made(x * 1)
        events = [event for event in seen.events() if [x.numel() // K, K] in event.input_shapes]
        counts.append(sum(event.name in ("aten::mm", "aten::addmm", "aten::addmm_") for event in events))
        adds = sum(e.name in ("aten::add", "aten::add_") for e in seen.events() if list(x.shape) in e.input_shapes)
    return counts[0], counts[1], adds


def test_reads_of_x(seed: int) -> None:
    """Beside the frozen products: x once forward and once backward, and no sum of the parts of
    dx.
    """
    grouped, alone = (model("lora", seed, inner=Siblings) for _ in range(2))
    dk.accelerate(grouped)
    dk.accelerate(alone, group=False)
    for made in (grouped, alone):
        warm_up(made)
    forward, backward, adds = _products(alone, batch(seed))
    assert (forward, backward, adds) == (6, 3 + 3, 2)  # of the backward ones three read dx's beginnings
    forward, backward, adds = _products(grouped, batch(seed))
    assert (forward, backward, adds) == (4, 1 + 3, 0)


def test_groups_that_are_given(seed: int, shared: list[int]) -> None:
    """A resumed run, told the groups, equals the uninterrupted one bit for bit."""
    made, _, report = pair("dora", seed)
    resumed = model("dora", seed)
    resumed.load_state_dict(made.state_dict())
    shared.clear()
    again = dk.accelerate(resumed, group=report.groups)
    assert again.groups == report.groups == FOUND
    for ours, theirs in zip(step(resumed, batch(seed)).values(), step(made, batch(seed)).values(), strict=True):
        assert torch.equal(ours, theirs)
    assert shared == [3, 2] * 2
    assert dk.accelerate(made, group=False).groups == ()
    step(made, batch(seed))
    assert shared == [3, 2] * 2
    assert dk.accelerate(made, group=[list(FOUND[1])]).groups == FOUND[1:]
    dk.restore(made)
    assert not any(hasattr(module, "_shared_input") for module in made.modules())


@pytest.mark.parametrize(("first", "found"), [("k", []), ("v", ["qk"]), ("kv", ["kv"]), ("qv", ["qv"])])
def test_a_first_pass_through_some(first: str, found: list[str], seed: int) -> None:
    """A layer that comes round again ends the watching, whatever it is given."""
    made, plain = (model("lora", seed, inner=Siblings) for _ in range(2))
    report = dk.accelerate(made)
    for order in (first, *["qkv"] * 3, first, "vkq"):
        for each in (made, plain):
            each.base_model.model.order = order
        check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    assert ["".join(name[-1] for name in group) for group in report.groups] == found


@pytest.mark.parametrize(
    ("group", "error", "words"),
    [
        ("q", TypeError, "must be True, False or lists of layer names"),
        (3, TypeError, "got a int"),
        ([["a"]], TypeError, "of two layers or more"),
        ([[f"{BLOCK}.gate", f"{BLOCK}.missing"]], ValueError, "missing"),
        ([[f"{BLOCK}.gate", f"{BLOCK}.gate"]], ValueError, "twice"),
    ],
)
def test_groups_that_can_not_be(group: Any, error: type[Exception], words: str, seed: int) -> None:
    made = model("lora", seed)
    with pytest.raises(error, match=words) as raised:
        dk.accelerate(made, group=group)
    assert "accelerate: group" in str(raised.value)
    assert dk.restore(made) == 0


@pytest.mark.parametrize("how", ["deepcopy", "pickle"])
def test_copies_are_watched_anew(how: str, seed: int, shared: list[int]) -> None:
    made, plain, _ = pair("lora", seed)
    twin = copy.deepcopy(made) if how == "deepcopy" else pickle.loads(pickle.dumps(made))
    for name, parameter in twin.named_parameters():
        parameter.data.mul_(1.5)
        dict(plain.named_parameters())[name].data.mul_(1.5)
    shared.clear()
    for number in range(3):
        check_same(step(twin, batch(seed)), step(plain, batch(seed)), 1e-12)
        assert shared == [3, 2] * number
    made.zero_grad(set_to_none=True)
    assert not torch.equal(twin(batch(seed)), made(batch(seed)))
    assert shared == [3, 2] * 4


def test_calls_out_of_the_ordinary(seed: int, shared: list[int]) -> None:
    """Batched gradients, autocast in the backward pass, inference mode; second derivatives
    raise.
    """
    made, plain, _ = pair("dora", seed, inner=Siblings)
    results = []
    for each in (made, plain):
        x = batch(seed).requires_grad_()
        y = each(x)
        inputs = [x, *(p for p in each.parameters() if p.requires_grad)]
        douts = torch.randn(3, *y.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
        batched = torch.autograd.grad(y, inputs, douts, is_grads_batched=True, retain_graph=True)
        with torch.autocast("cpu", torch.bfloat16):
            warm = torch.autograd.grad(y, inputs, douts[0])
        results.append({str(i): value for i, value in enumerate((*batched, *warm))})
    check_same(*results, 1e-12)
    x = batch(seed).requires_grad_()
    dx = torch.autograd.grad(made(x).square().sum(), x, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="no second derivative"):
        dx.sum().backward()
    shared.clear()
    with torch.inference_mode():
        y = made(batch(seed))
    assert shared == []
    check_same({"y": y.clone()}, {"y": plain(batch(seed)).detach()}, 1e-12)


def test_ddp(seed: int, process_group: None, shared: list[int]) -> None:
    """With an output that nothing is made of, whose parameters DDP counts as unused."""
    made, plain, _ = pair("lora", seed, inner=Siblings)
    for unused in (False, True):
        wrapped = nn.parallel.DistributedDataParallel(made, find_unused_parameters=unused)
        for _ in range(2):
            results = []
            for each in (wrapped, plain):
                each.zero_grad(set_to_none=True)
                y = each(batch(seed))
                (y[..., :36] if unused else y).square().sum().backward()
                results.append({k.removeprefix("module."): v for k, v in gradients(each).items()})
            check_same(results[0], {name: results[1].get(name, torch.zeros_like(v)) for name, v in results[0].items()})
        del wrapped
    assert shared[-1] == 3


@pytest.fixture(params=["given", "found"])
def learned(request: pytest.FixtureRequest, seed: int) -> Iterator[tuple[Any, Any]]:
    made, plain = model("lora", seed), model("lora", seed)
    report = dk.accelerate(made, group=FOUND if request.param == "given" else True)
    yield made, plain
    assert report.groups == FOUND


def test_training(learned: tuple[Any, Any], seed: int) -> None:
    """Ten steps of AdamW stay beside PEFT's, modes and evaluations between them."""
    optimizers = [torch.optim.AdamW([p for p in each.parameters() if p.requires_grad], lr=1e-3) for each in learned]
    for number in range(10):
        results = []
        for each, optimizer in zip(learned, optimizers, strict=True):
            results.append(step(each, batch(seed + number)))
            optimizer.step()
            with torch.no_grad():
                results[-1] |= {"after": each(batch(seed))}
                with each.disable_adapter():
                    results[-1] |= {"reference": each(batch(seed))}
        check_same(*results, 1e-9)
