"""Siblings of which one is planned while the others could go the straight way: the numbers of each
alone, and the same bits where checkpointing runs a forward pass a second time.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from peft_pairs import check_same
from siblings import Attention, batch, model, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk


def _train_bias(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features, dtype=torch.float64))


def _drop(layer: Any) -> None:
    part = layer.delora_dropout if hasattr(layer, "delora_dropout") else layer.lora_dropout
    part["default"] = nn.Dropout(0.25)


def _freeze(role: str) -> Callable[[Any], None]:
    def freeze(layer: Any) -> None:
        for name, parameter in layer.named_parameters():
            if name.endswith((f"lora_{role}.default", f"lora_{role}.default.weight")):
                parameter.requires_grad_(False)

    return freeze


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a bias trained": _train_bias,
    "dropout": _drop,
    "A frozen": _freeze("A"),
    "B frozen": _freeze("B"),
    "frozen whole": lambda layer: layer.requires_grad_(False),
    "A in bfloat16": lambda layer: layer.lora_A["default"].to(torch.bfloat16),
    "W trained": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "an int scale": lambda layer: layer.scaling.update(default=2),
    "a hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
}
CASES = [("lora", name) for name in CHANGES] + [
    (method, name) for method in ("dora", "delora") for name in ("dropout", "A frozen", "frozen whole")
]


@pytest.mark.parametrize("member", ["q", "k"])
@pytest.mark.parametrize(("method", "change"), CASES)
def test_one_is_planned(
    method: str, change: str, member: str, seed: int, shared: list[int], planned: list[int]
) -> None:
    """The first of them or another: output, dx and every gradient, from the first step on."""
    for reentrant in (False, True):
        made, alone = (model(method, seed, inner=Attention) for _ in range(2))
        for each in (made, alone):
            CHANGES[change](getattr(each.base_model.model, member))
        dk.accelerate(made)
        dk.accelerate(alone, group=False)
        seen: list[Tensor] = []
        of_qkv = made.base_model.model.o
        of_qkv.register_forward_pre_hook(lambda _, args, seen=seen: seen.append(args[0].detach()))
        planned.clear()
        for number in range(3):
            results = []
            for each in (made, alone):
                torch.manual_seed(seed + number)
                results.append(step(each, batch(seed + number), partial(checkpoint, use_reentrant=reentrant)))
            check_same(*results, 1e-12)
            first, again = seen[-2:]
            assert len(seen) == 2 * (number + 1)
            assert torch.equal(first, again)
        if method != "dora" and change != "a hook on the base":  # of these the other two are a group
            # a forward pass and its recomputation, once the group is known
            assert planned == ([3] * 4 if member == "q" else [])
            assert shared == []
