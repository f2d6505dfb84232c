"""The CUDA kernels on tensors with torch's negative bit."""

import pytest
from host_backend import SANITIZED
from negative_bit import NAMES, check_negative_bit

if SANITIZED:
    pytest.skip("no address hangs on it", allow_module_level=True)


@pytest.mark.parametrize("name", NAMES)
def test_negative_bit(name: str, seed: int) -> None:
    check_negative_bit(name, "cuda", seed)
