"""A replayed call computes what the call does: the same bits of y and of every gradient, on tensors
that it was not recorded with.
"""

import pytest
from host_backend import SANITIZED
from replays import check_replay

from delora_kernels.backends import cuda as backend
from delora_kernels.testing import METHODS

if SANITIZED:
    pytest.skip("addresses are tested elsewhere", allow_module_level=True)

SIZES = (70, 150, 40, 3)
"""T, K, N, R: sums that are split, masks and vectors with rests."""


@pytest.mark.parametrize("name", METHODS)
def test_replayed_calls_give_the_same_bits(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    check_replay(name, backend, SIZES, seed, monkeypatch)
