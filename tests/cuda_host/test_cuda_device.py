"""The CUDA backend makes every tensor where its inputs are (tests/helpers/another_device.py)."""

import another_device
import pytest
from host_backend import SANITIZED


@pytest.mark.skipif(SANITIZED, reason="the other build has the addresses")
@pytest.mark.skipif(not another_device.HERE, reason="this torch can't make a device of Python code")
def test_every_op(seed: int) -> None:
    another_device.check(seed, "cuda")
