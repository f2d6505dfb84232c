"""A replayed call computes what the call does: the same bits of y and of every gradient, on tensors
that it was not recorded with.
"""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels import use_backend
from delora_kernels.backends import tape
from delora_kernels.backends import triton as backend
from delora_kernels.testing import METHODS

SIZES = (5, 70, 12, 2)
"""T, K, N, R: a sum over K that is split, masks and vectors with rests."""

BY_CONTENT = [name for name in METHODS if name.startswith("grouped")]
"""Methods that read how many tokens each group has: they are never replayed."""


@pytest.mark.parametrize("name", METHODS)
def test_replayed_calls_give_the_same_bits(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tape, "_known", {})
    method = METHODS[name]
    draws = [method.draw(*SIZES, dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed + i) for i in range(4)]
    with use_backend("triton"), torch.autocast("cpu", torch.bfloat16):
        expected = method.fused(draws[-1])
        monkeypatch.setattr(backend, "begin", lambda device: 0)  # None in the interpreter: nothing is replayed
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
