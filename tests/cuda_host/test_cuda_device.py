"""The CUDA backend makes every tensor where its inputs are (tests/another_device.py)."""

import sys
from pathlib import Path

import pytest
from host_backend import SANITIZED

sys.path.insert(0, str(Path(__file__).parents[1]))
import another_device


@pytest.mark.skipif(SANITIZED, reason="the other build has the addresses")
@pytest.mark.skipif(not another_device.HERE, reason="this torch can't make a device of Python code")
def test_every_op(seed: int) -> None:
    another_device.check(seed, "cuda")
