"""Nothing assumes that tensors are on the CPU: all runs on a device that refuses those that are
(another_device.py).
"""

import another_device
import pytest


@pytest.mark.skipif(not another_device.HERE, reason="this torch can't make a device of Python code")
def test_another_device(seed: int) -> None:
    another_device.check(seed)
