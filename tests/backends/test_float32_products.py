"""Whether tf32 is allowed, said by either of PyTorch's interfaces, each in a process that has used no other."""

import subprocess
import sys

import pytest
import torch

NEW = pytest.mark.skipif(not hasattr(torch.backends, "fp32_precision"), reason="this torch has one interface")


@pytest.mark.parametrize(
    ("statement", "allowed"),
    [
        ("pass", False),
        ("torch.set_float32_matmul_precision('high')", True),
        ("torch.set_float32_matmul_precision('medium')", True),
        ("torch.backends.cuda.matmul.allow_tf32 = True", True),
        ("torch.backends.cudnn.allow_tf32 = True", False),
        pytest.param("torch.backends.cuda.matmul.fp32_precision = 'tf32'", True, marks=NEW),
        pytest.param("torch.backends.cuda.matmul.fp32_precision = 'ieee'", False, marks=NEW),
        pytest.param("torch.backends.fp32_precision = 'tf32'", True, marks=NEW),
    ],
)
def test_allowed(statement: str, allowed: bool) -> None:
    code = f"import torch; {statement}; from delora_kernels.dtypes import allow_tf32 as f; print(f())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == str(allowed), done.stderr
