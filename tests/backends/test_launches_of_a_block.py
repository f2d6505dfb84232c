"""What a GPU is asked to launch for the linears of one block of a Llama (q, k, v, o, gate, up,
down), forward and backward, one by one and in groups: the figures of docs/shared-inputs.md.

A stand-in for the driver counts kernels, torch's profiler the calls of torch that would launch one.
"""

import os
from collections import Counter

import pytest
import torch

pytest.importorskip("triton")
pytest.importorskip("peft")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter launches nothing", allow_module_level=True)

from launches_seen import Seen
from siblings import batch, model
from torch.profiler import ProfilerActivity, profile

import delora_kernels as dk
from delora_kernels import use_backend

JOINS = 1
"""Calls of torch.cat in the block itself."""


def launched(seen: Seen, method: str, seed: int, group: bool) -> dict[str, int]:
    """Launches of one step under autocast, float32 factors on a bfloat16 base."""
    made = model(method, seed, dtype=torch.bfloat16)
    for name, parameter in made.named_parameters():
        if "default" in name:
            parameter.data = parameter.data.float()
    dk.accelerate(made, strict=True, group=group)
    x = batch(seed, torch.bfloat16).requires_grad_()

    def step() -> None:
        with torch.autocast("cpu", torch.bfloat16):
            y = made(x)
        y.backward(torch.ones_like(y))

    with use_backend("triton"):
        for _ in range(3):
            step()
        seen.launches.clear()
        with profile(activities=[ProfilerActivity.CPU]) as profiled:
            step()
    ops: Counter[str] = Counter()
    for event in profiled.key_averages():
        ops[event.key.removeprefix("aten::")] += event.count
    products = ops["addmm_"] + ops["addmm"] + ops["mm"]
    sums = ops["add"] + ops["add_"]
    return {"kernels": len(seen.launches), "products": products, "joins": ops["cat"] - JOINS, "sums": sums}


@pytest.mark.parametrize(("method", "kernels"), [("lora", (42, 36)), ("delora", (49, 43)), ("dora", (56, 56))])
def test_launches(method: str, kernels: tuple[int, int], seen: Seen, seed: int) -> None:
    alone, grouped = launched(seen, method, seed, False), launched(seen, method, seed, True)
    assert (alone["kernels"], grouped["kernels"]) == kernels
    assert alone["products"] == grouped["products"] == 14
    groups = method != "dora"  # a DoRA layer runs alone
    assert (alone["joins"], grouped["joins"]) == (0, 6 * groups)
    assert alone["sums"] - grouped["sums"] == 3 * groups
