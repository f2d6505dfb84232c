"""The Triton backend makes every tensor where its inputs are (tests/helpers/another_device.py)."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

import another_device


@pytest.mark.skipif(not another_device.HERE, reason="this torch can't make a device of Python code")
def test_every_op(seed: int) -> None:
    another_device.check(seed, "triton")
