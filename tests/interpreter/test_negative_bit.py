"""The Triton kernels on tensors with torch's negative bit."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from negative_bit import NAMES, check_negative_bit


@pytest.mark.parametrize("name", NAMES)
def test_negative_bit(name: str, seed: int) -> None:
    check_negative_bit(name, "triton", seed)
