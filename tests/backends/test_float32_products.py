"""Whether tf32 is allowed, said by either of PyTorch's interfaces, each in a process that has used
no other.
"""

import subprocess
import sys

import pytest
import torch

STATEMENTS = {
    "pass": False,
    "torch.set_float32_matmul_precision('high')": True,
    "torch.set_float32_matmul_precision('medium')": True,
    "torch.backends.cuda.matmul.allow_tf32 = True": True,
    "torch.backends.cudnn.allow_tf32 = True": False,
}
NEW = {
    "torch.backends.cuda.matmul.fp32_precision = 'tf32'": True,
    "torch.backends.cuda.matmul.fp32_precision = 'ieee'": False,
    "torch.backends.fp32_precision = 'tf32'": True,
}
HAS_NEW = hasattr(torch.backends, "fp32_precision")

PROGRAM = """
import os, sys, torch
for statement in sys.argv[1:]:  # each in a fork of a process that has only imported torch
    if not (child := os.fork()):
        exec(statement)
        from delora_kernels.dtypes import allow_tf32
        print(allow_tf32(), statement, flush=True)
        os._exit(0)
    os.waitpid(child, 0)
"""


@pytest.fixture(scope="module")
def answers() -> dict[str, str]:
    """Statement → what is allowed after it."""
    command = [sys.executable, "-c", PROGRAM, *STATEMENTS, *(NEW if HAS_NEW else {})]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    print(done.stderr)
    lines = (line.split(" ", 1) for line in done.stdout.splitlines())
    return {statement: allowed for allowed, statement in lines}


@pytest.mark.parametrize("statement", [*STATEMENTS, *NEW])
def test_allowed(statement: str, answers: dict[str, str]) -> None:
    if statement in NEW and not HAS_NEW:
        pytest.skip("this torch has one interface")
    assert answers[statement] == str((STATEMENTS | NEW)[statement])
