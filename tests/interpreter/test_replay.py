"""A replayed call computes what the call does: the same bits of y and of every gradient, on tensors
that it was not recorded with.
"""

import os

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from replays import check_replay

from delora_kernels.backends import triton as backend
from delora_kernels.testing import METHODS

SIZES = (5, 70, 12, 2)
"""T, K, N, R: a sum over K that is split, masks and vectors with rests."""


@pytest.mark.parametrize("name", METHODS)
def test_replayed_calls_give_the_same_bits(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_replay(name, backend, SIZES, seed, monkeypatch)
