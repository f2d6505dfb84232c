"""A replayed pass gives the CUDA library what the call gives it: every number, and the pointers of
the day. In front of a stand-in for the library, which computes nothing.
"""

import os
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the stand-ins are for the compiled backends", allow_module_level=True)

from benchmarks.stand_in import cuda_standing_in
from delora_kernels import use_backend
from delora_kernels.backends import tape
from delora_kernels.backends.cuda import launch
from delora_kernels.testing import METHODS


def named(value: Any, names: dict[int, str]) -> Any:
    """An argument, with the name of an input for its pointer, "memory" for any other pointer."""
    if isinstance(value, launch.Matrix):
        return named(value.data, names), value.row_stride, value.column_stride, value.dtype
    if isinstance(value, launch.Vector):
        return named(value.data, names), value.stride, value.dtype
    return names.get(value, "memory" if value > 1 << 32 else value) if type(value) is int else value


@pytest.mark.parametrize("method", [name for name in METHODS if not name.startswith("grouped")])
def test_a_replay_gives_what_the_call_gives(method: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_known", {})
    monkeypatch.setattr(tape, "calls", {})
    drawn: Any = {"dtype": torch.bfloat16, "adapter_dtype": torch.float32, "seed": seed}
    inputs = METHODS[method].draw(64, 128, 256, 16, **drawn)
    seen: list[tuple[Any, ...]] = []

    def seeing(name: str) -> Any:
        return lambda *arguments: seen.append((name, *arguments[:-1])) or 0  # without the stream

    def run(inputs: dict[str, Any]) -> list[Any]:
        seen.clear()
        METHODS[method].fused(inputs)
        tensors = {name: value for name, value in inputs.items() if isinstance(value, Tensor) and value.numel()}
        names = {value.data_ptr(): name for name, value in tensors.items()}
        return [[named(argument, names) for argument in arguments] for arguments in seen]

    with cuda_standing_in(), use_backend("cuda"):
        for name in launch.LAUNCHERS:
            setattr(launch.library(), f"dk_{name}", seeing(name))
        for _ in range(3):
            run(inputs)
        assert [type(known) for known in tape._known.values()] == [tuple, tuple]
        fresh = {name: value.clone() if isinstance(value, Tensor) else value for name, value in inputs.items()}
        replayed = run(fresh)
        assert replayed
        monkeypatch.setattr(tape, "enabled", False)
        assert run(fresh) == replayed
