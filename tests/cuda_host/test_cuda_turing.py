"""What the kernels do otherwise on sm_75, without asynchronous copies and bfloat16 tensor cores, on
the CPU.
"""

import ctypes
from pathlib import Path

import host_build
import pytest
import torch
from host_backend import SANITIZED, shuffle_threads

from delora_kernels.backends.cuda import launch
from delora_kernels.testing import failures
from delora_kernels.testing.ops.problems import op_problems

CSRC = Path(__file__).parents[2] / "csrc"

FILES = {file.name: file.read_text(encoding="utf-8") for file in sorted(CSRC.glob("*.cu"))}
TURING = {name: "#define __CUDA_ARCH__ 750\n" + text for name, text in FILES.items() if '"product.cuh"' in text}
DTYPES = ((torch.float32, None), (torch.float16, None), (torch.float16, torch.float32), (torch.bfloat16, torch.float32))


@pytest.mark.skipif(SANITIZED, reason="the other build has the addresses")
@pytest.mark.parametrize("name", ["row_norm", "project", "expand", "expand_backward", "input_backward"])
def test_ops(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    library = ctypes.CDLL(str(host_build.build(replaced=TURING)))
    monkeypatch.setattr("delora_kernels.backends.cuda.library.load", lambda functions=(): library)
    launch.library.cache_clear()
    try:
        shuffle_threads(seed)
        for narrow, wide in DTYPES:
            for T, K, N, R in ((7, 19, 13, 3), (70, 400, 136, 35)):
                for problem in op_problems(name, T, K, N, R, backend="cuda", dtype=narrow, rank_dtype=wide, seed=seed):
                    assert failures(problem) == []
    finally:
        monkeypatch.undo()
        launch.library.cache_clear()
