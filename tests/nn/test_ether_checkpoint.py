"""Checkpoints of the authors' training code: what their layers computed, from what they would have
saved.
"""

from typing import Any

import pytest
import torch
from ether_cases import NAMES, EtherCase, ether_cases
from torch import nn

from delora_kernels.nn import EtherLinear, EtherPlusLinear, load_ether_checkpoint
from delora_kernels.testing import relative_error

CASES = [case for case in ether_cases() if "qkv" not in case.name]


def saved(case: EtherCase) -> tuple[nn.Module, dict[str, Any], bool]:
    """A model with the case's frozen layer, the checkpoint of its vectors, flip_side."""
    weight, bias = case.arguments["weight"], case.arguments.get("bias")
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None).double()
    with torch.no_grad():
        linear.weight.copy_(weight)
        if bias is not None:
            linear.bias.copy_(bias)
    side = "both" if "HH" in case.name else "output" if "u_out" in case.grads else "input"
    vectors = {
        f"block.proj.ether_{theirs}": case.arguments[ours] for theirs, ours in NAMES[side].items() if ours in case.grads
    }
    return nn.ModuleDict({"block": nn.ModuleDict({"proj": linear})}), vectors, side == "output"


@pytest.mark.parametrize("case", CASES, ids=str)
def test_computes_what_their_layer_did(case: EtherCase) -> None:
    model, vectors, flip_side = saved(case)
    assert load_ether_checkpoint(model, {"model": vectors}, flip_side=flip_side) == ["block.proj"]
    module = model.get_submodule("block.proj")
    assert type(module) is (EtherPlusLinear if "plus" in case.function else EtherLinear)
    assert relative_error(module(case.arguments["x"]), case.output) <= 1e-12


@pytest.mark.parametrize(
    ("change", "options", "text"),
    [
        (lambda v: {}, {}, "state_dict must be a checkpoint with keys like layer.ether_R, got 0 others"),
        (
            lambda v: {"block.qkv.ether_R": v["block.proj.ether_R"]},
            {},
            "model must be one with a layer block.qkv, got none",
        ),
        (lambda v: {"block.proj.ether_Rq": v["block.proj.ether_R"]}, {}, "fused query-key-value layers"),
        (
            lambda v: v,
            {"flip_side": True},
            "block.proj.ether_R must be [blocks, features / blocks] = [4, 10], got [4, 12]",
        ),
    ],
)
def test_what_does_not_fit_leaves_the_model_as_it_was(change: Any, options: dict[str, Any], text: str) -> None:
    model, vectors, _ = saved(next(case for case in CASES if case.name.startswith("ether_official_input_nb4_T37")))
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is the point)
        load_ether_checkpoint(model, change(vectors), **options)
    assert text in str(caught.value)
    assert type(model.get_submodule("block.proj")) is nn.Linear
