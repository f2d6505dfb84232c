"""Nothing assumes that tensors are on the CPU: all runs on a device that refuses those that are (another_device.py)."""

import os
import subprocess
import sys
from pathlib import Path

import another_device
import pytest


@pytest.mark.skipif(not another_device.HERE, reason="this torch can't make a device of Python code")
def test_another_device(seed: int) -> None:
    """In a process of its own: a registered device is one that Transformers would find."""
    variables = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", str(Path(another_device.__file__)), str(seed)]
    done = subprocess.run(command, capture_output=True, text=True, env=variables, timeout=500)
    assert done.returncode == 0, done.stderr
