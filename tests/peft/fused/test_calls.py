"""Ways of calling an accelerated layer: shapes, modes, in-place neighbours, swapped parameters,
other bases.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fused_count import counted
from peft_models import METHODS
from peft_pairs import TARGETS, batch, check_same, gradients, pair, step
from torch import Tensor
from torch.nn.utils import parametrizations, prune

torch.set_num_threads(1)

Results = dict[str, Tensor]


def _first(made: Any) -> Any:
    return made.base_model.model.first


def _shape(*shape: int) -> Callable[[Any, Tensor], Results]:
    return lambda made, x: step(made, x.flatten()[: torch.Size(shape).numel()].view(shape))


def _inference_mode(made: Any, x: Tensor) -> Results:
    with torch.inference_mode():
        y = made(x)
    return {"y": y.clone()}


def _relu_in_place(made: Any, x: Tensor) -> Results:
    x = x.clone().requires_grad_()
    y = _first(made)(x).relu_()
    y.square().sum().backward()
    return {"y": y.detach(), "x": x.grad} | gradients(made)


def _graph_kept(made: Any, x: Tensor) -> Results:
    y = made(x)
    y.sum().backward(retain_graph=True)
    y.square().sum().backward()
    return gradients(made)


def _functional_call(made: Any, x: Tensor) -> Results:
    """Other parameters for the time of one call."""
    others = {name: (p.detach() * 1.1).requires_grad_(p.requires_grad) for name, p in made.named_parameters()}
    y = torch.func.functional_call(made, others, (x,))
    y.sum().backward()
    return {"y": y.detach()} | {name: p.grad for name, p in others.items() if p.grad is not None}


def _only_the_base_trains(made: Any, x: Tensor) -> Results:
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("base_layer" in name)
    return step(made, x)


def _nothing_trains(made: Any, x: Tensor) -> Results:
    return {"y": made.requires_grad_(False)(x)}


def _same_adapter_twice(made: Any, x: Tensor) -> Results:
    made.base_model.set_adapter(["default", "default"])
    return step(made, x)


def _scales(*scales: float) -> Callable[[Any, Tensor], Results]:
    def call(made: Any, x: Tensor) -> Results:
        for name, scale in zip(TARGETS, scales, strict=True):
            getattr(made.base_model.model, name).scaling["default"] = scale
        return step(made, x)

    return call


def _weight_norm(made: Any, x: Tensor) -> Results:
    parametrizations.weight_norm(_first(made).base_layer)
    return step(made, x)


def _pruned(made: Any, x: Tensor) -> Results:
    prune.l1_unstructured(_first(made).base_layer, "weight", 0.3)
    return step(made, x)


LORAS = ("lora", "dora")
CALLS: dict[str, tuple[Callable[[Any, Tensor], Results], int, tuple[str, ...]]] = {
    "no tokens": (_shape(0, 12), 3, METHODS),
    "one empty dimension": (_shape(2, 0, 12), 3, METHODS),
    "one token": (_shape(12), 3, ("lora", "rslora", "delora")),
    "one token, DoRA": (_shape(12), 2, ("dora",)),  # of one dimension PEFT's DoRA makes two, in the first layer
    "four dimensions": (_shape(1, 2, 5, 12), 3, METHODS),
    "transposed": (lambda made, x: step(made, x.permute(2, 0, 1).contiguous().permute(1, 2, 0)), 3, METHODS),
    "expanded": (lambda made, x: step(made, x[:1].expand(3, 5, 12)), 3, METHODS),
    "by keyword": (lambda made, x: {"y": _first(made)(x=x)}, 1, METHODS),
    "inference mode": (_inference_mode, 3, METHODS),
    "ReLU in place": (_relu_in_place, 1, METHODS),
    "graph kept": (_graph_kept, 3, METHODS),
    "functional_call": (_functional_call, 3, METHODS),
    "only the base trains": (_only_the_base_trains, 3, METHODS),
    "nothing trains": (_nothing_trains, 3, METHODS),
    "same adapter twice": (_same_adapter_twice, 3, ("lora", "delora")),
    "scales of zero, less and int": (_scales(0.0, -0.5, 3), 3, LORAS),
    "weight norm": (_weight_norm, 3, ("lora", "rslora", "delora")),  # the first layer's rank term alone
    "weight norm, DoRA": (_weight_norm, 2, ("dora",)),
    "pruned": (_pruned, 3, ("lora", "rslora", "delora")),
    "pruned, DoRA": (_pruned, 2, ("dora",)),
}
RUNS = [(name, method) for name, (_, _, methods) in CALLS.items() for method in methods]


@pytest.mark.parametrize(("name", "method"), RUNS, ids=[f"{name}-{method}" for name, method in RUNS])
def test_call(name: str, method: str, seed: int) -> None:
    call, fused, _ = CALLS[name]
    made, plain = pair(method, seed)
    with counted() as passes:
        ours = call(made, batch(seed))
    check_same(ours, call(plain, batch(seed)))
    assert len(passes) == fused
