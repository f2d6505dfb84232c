"""How far a call walks: the files that one forward pass enters, and how often it goes from one to
another.

Counted are the library's Python functions in the order in which they are entered. A call is a first
one: of tensors and of a layer that were never seen before, after another call has imported what is
imported lazily.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import delora_kernels as dk
from delora_kernels import functional as F

PACKAGE = str(Path(dk.__file__).parent)

LIMITS = {"lora": 10, "dora": 14, "moe": 21, "accelerated": 22}
"""Call → most changes of file: 60 % of the 18, 24, 35 and 38 that there were at 01ce3e9."""


def way(call: Callable[[], Any]) -> list[str]:
    """The files of the package whose functions `call` enters, each as often as it is come to from
    another.
    """
    files: list[str] = []

    def enter(frame: FrameType, event: str, argument: object) -> None:
        file = frame.f_code.co_filename
        if event == "call" and file.startswith(PACKAGE) and files[-1:] != [file]:
            files.append(file)

    previous = sys.getprofile()
    sys.setprofile(enter)
    try:
        call()
    finally:
        sys.setprofile(previous)
    return [file.removeprefix(PACKAGE + "/") for file in files]


def _call(name: str) -> Callable[[], Any]:
    """A call of fresh tensors, everything trained but W."""
    T, K, N, r, E = 8, 16, 24, 4, 3
    x, W = torch.randn(T, K), torch.randn(N, K)
    trained = [torch.randn(*size).requires_grad_() for size in ((r, K), (N, r), (N,), (E, r, K), (E, N, r), (E, K))]
    A, B, m, A_experts, B_experts, router = trained
    if name == "lora":
        return lambda: F.lora_linear(x, W, A, B)
    if name == "dora":
        return lambda: F.dora_linear(x, W, A, B, m)
    if name == "moe":
        return lambda: F.moe_lora_linear(x, W, A_experts, B_experts, router, top_k=2)
    peft = pytest.importorskip("peft")
    model: Any = nn.ModuleDict({"linear": nn.Linear(K, N)})
    peft.inject_adapter_in_model(peft.LoraConfig(r=r, target_modules=["linear"]), model)
    dk.accelerate(model)
    return lambda: model["linear"](x)


@pytest.mark.parametrize("name", LIMITS)
def test_way_of_a_first_call(name: str) -> None:
    _call(name)()
    files = way(_call(name))
    print(" → ".join(files))
    assert len(files) - 1 <= LIMITS[name], f"{len(set(files))} files, {len(files) - 1} changes"
