"""A replayed call computes what the call does: the same bits of y and of every gradient, on tensors
that it was not recorded with.
"""

import pytest
import torch
from host_backend import SANITIZED

from delora_kernels import use_backend
from delora_kernels.backends import cuda as backend
from delora_kernels.backends import tape
from delora_kernels.testing import METHODS

if SANITIZED:
    pytest.skip("addresses are tested elsewhere", allow_module_level=True)

SIZES = (70, 150, 40, 3)
"""T, K, N, R: sums that are split, masks and vectors with rests."""

BY_CONTENT = [name for name in METHODS if name.startswith("grouped")]
"""Methods that read how many tokens each group has: they are never replayed."""


@pytest.mark.parametrize("name", METHODS)
def test_replayed_calls_give_the_same_bits(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    method = METHODS[name]
    draws = [method.draw(*SIZES, dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed + i) for i in range(4)]
    with use_backend("cuda"), torch.autocast("cpu", torch.bfloat16):
        expected = method.fused(draws[-1])
        monkeypatch.setattr(backend, "begin", lambda device: 0)  # None on the host: nothing is replayed
        monkeypatch.setattr(tape, "_known", {})
        for draw in draws[:-1]:
            method.fused(draw)
        known = list(tape._known.values())
        if name in BY_CONTENT:
            assert set(known) == {-1}
        else:
            assert [type(each) for each in known] == [tuple, tuple], known  # forward and backward
        found = method.fused(draws[-1])
    assert list(tape._known.values()) == known
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
