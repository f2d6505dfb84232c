"""A group of which one call is planned and the others could go the straight way: as alone, and the
same again where checkpointing runs a forward pass a second time.
"""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft_pairs import check_same
from siblings import batch, model, step
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk


def _train_bias(layer: Any) -> None:
    layer.base_layer.bias = nn.Parameter(torch.linspace(-1, 1, layer.out_features, dtype=torch.float64))


def _drop(layer: Any) -> None:
    layer.lora_dropout["default"] = nn.Dropout(0.25)


def _in_bfloat16(layer: Any) -> None:
    layer.lora_A["default"].to(torch.bfloat16)


CHANGES: dict[str, Callable[[Any], Any]] = {
    "a bias trained": _train_bias,
    "dropout": _drop,
    "A frozen": lambda layer: layer.lora_A["default"].weight.requires_grad_(False),
    "B frozen": lambda layer: layer.lora_B["default"].weight.requires_grad_(False),
    "frozen whole": lambda layer: layer.requires_grad_(False),
    "A in bfloat16": _in_bfloat16,
    "W trained": lambda layer: layer.base_layer.weight.requires_grad_(True),
    "an int scale": lambda layer: layer.scaling.update(default=2),
    "a hook on the base": lambda layer: layer.base_layer.register_forward_hook(lambda *_: None),
}
SHARED = {name: name not in ("W trained", "a hook on the base") for name in CHANGES}
"""Whether the change leaves one call of a public function, which a group may take."""


@pytest.mark.parametrize("reentrant", [False, True, None])
@pytest.mark.parametrize("member", ["q", "k", "v"])
@pytest.mark.parametrize("change", CHANGES)
def test_one_member_is_planned(
    change: str, member: str, reentrant: bool | None, seed: int, shared: list[int], planned: list[int]
) -> None:
    """Outputs and every gradient; the recomputation gives the bits of its forward pass."""
    made, alone = model("lora", seed), model("lora", seed)
    outputs: list[Tensor] = []
    for each in (made, alone):
        CHANGES[change](getattr(each.base_model.model[0].attention, member))
    made.base_model.model[0].attention.o.register_forward_pre_hook(lambda _, args: outputs.append(args[0].detach()))
    dk.accelerate(made)
    dk.accelerate(alone, group=False)

    def forward(each: Any, x: Tensor) -> Tensor:
        y: Tensor = each(x) if reentrant is None else checkpoint(each, x, use_reentrant=reentrant)
        return y

    for number in range(4):
        results = []
        for each in (made, alone):
            torch.manual_seed(seed + number)
            results.append(step(each, batch(seed + number), forward))
        check_same(*results, 1e-12)
        first, *again = outputs
        assert len(again) == (reentrant is not None)
        assert all(torch.equal(first, each) for each in again), number
        outputs.clear()
    print(change, member, reentrant, shared, planned)
