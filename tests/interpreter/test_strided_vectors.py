"""The Triton kernels on vectors that lie apart in memory."""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from strided_vectors import check_vectors

from delora_kernels.testing import METHODS


@pytest.mark.parametrize("name", METHODS)
def test_vectors_apart(name: str, seed: int) -> None:
    check_vectors(name, "triton", seed)
