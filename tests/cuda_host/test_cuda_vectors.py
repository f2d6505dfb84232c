"""The CUDA kernels on vectors that lie apart in memory."""

import pytest
from host_backend import SANITIZED
from strided_vectors import check_vectors

from delora_kernels.testing import METHODS

if SANITIZED:
    pytest.skip("addresses are tested elsewhere", allow_module_level=True)


@pytest.mark.parametrize("name", METHODS)
def test_vectors_apart(name: str, seed: int) -> None:
    check_vectors(name, "cuda", seed)
