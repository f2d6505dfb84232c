"""The bare arithmetic of a step is that of the method: each group's results are the reference's,
whichever way was the fastest.
"""

from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")

from benchmarks import arithmetic
from benchmarks.layer.methods import METHODS
from benchmarks.model_cases import SMALL, ModelCase
from benchmarks.overhead import random_tokens
from benchmarks.whole_model import adapted
from delora_kernels import reference

SIZES: dict[str, Any] = SMALL | {"hidden": 24, "intermediate": 40, "heads": 3, "kv_heads": 1, "vocabulary": 64}
SIZES |= {"blocks": 1, "batch": 2, "sequence": 8, "r": 4, "limit_mib": None}


def made(method: str) -> tuple[Any, Tensor]:
    case = ModelCase(method, precision="fp32", **SIZES)
    return adapted(case, "cpu", 1).double(), random_tokens(case, "cpu")


def expected(group: arithmetic.Group) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """y of each layer, dx, and the gradients of each layer's tensors."""
    x = group.x.clone().requires_grad_()
    outputs, leaves = [], []
    for layer in group.layers:
        own = [tensor.detach().clone().requires_grad_() for tensor in layer.trained]
        given: dict[str, Any] = dict(zip(("A", "B"), own, strict=False)) | {"weight": layer.weight}
        if layer.method == "delora":
            given |= {"lam": own[2], "weight_norm": layer.weight_norm, "eps": 1e-4}
        else:
            given |= {"scale": layer.scale} | ({"magnitude": own[2]} if layer.method == "dora" else {})
        outputs.append(getattr(reference, METHODS[layer.method].function)(x, **given))
        leaves += own
    grads = torch.autograd.grad(outputs, [x, *leaves], [layer.dy for layer in group.layers])
    return outputs, grads[0], list(grads[1:])


@pytest.mark.parametrize("last", [False, True], ids=["first way", "last way"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_results_are_the_methods(method: str, last: bool, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """float64: y, dx and every gradient; AdamW's step at a learning rate of 0 moves nothing."""
    monkeypatch.setattr(arithmetic.Fastest, "__call__", lambda self, kind, *ways: ways[-1 if last else 0]())
    torch.manual_seed(seed)
    model, tokens = made(method)
    bare = arithmetic.Bare(model, method, tokens)
    assert [len(group.layers) for group in bare.groups] == [3, 1, 2, 1]
    bare.step()
    for group in bare.groups:
        outputs, dx, grads = expected(group)
        found = [tensor.grad for layer in group.layers for tensor in layer.trained]
        theirs = [*outputs, dx, *grads]
        for ours, wanted in zip([*(layer.y for layer in group.layers), group.dx, *found], theirs, strict=True):
            assert ours is not None
            assert ours.shape == wanted.shape
            assert (ours - wanted).abs().max() <= 1e-10 * wanted.abs().max()
    bare.products()
    group = bare.groups[0]
    plain = sum(layer.dy @ layer.weight for layer in group.layers)
    assert (group.dx - plain).abs().max() <= 1e-12 * plain.abs().max()
    assert torch.equal(group.layers[1].y, group.x @ group.layers[1].weight.t())


def test_the_fastest_way_is_chosen_once() -> None:
    ran: list[int] = []
    fastest = arithmetic.Fastest()
    fastest("kind", lambda: [ran.append(i) for i in range(20000)], lambda: ran.append(-1))
    ran.clear()
    fastest("kind", lambda: ran.append(0), lambda: ran.append(1))
    assert ran == [1]
