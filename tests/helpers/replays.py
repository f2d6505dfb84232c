"""A call that is recorded, then replayed on tensors that it was not recorded with."""

from types import ModuleType

import pytest
import torch

from delora_kernels import use_backend
from delora_kernels.backends import tape
from delora_kernels.testing import METHODS

BY_CONTENT = [name for name in METHODS if name.startswith("grouped")]
"""Methods that read how many tokens each group has: they are never replayed."""


def check_replay(
    name: str, backend: ModuleType, sizes: tuple[int, int, int, int], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A replayed call of a method computes what the call does: the same bits of y and of every
    gradient.

    Args:
        name: Of METHODS.
        backend: Whose launches can't be replayed where there is no GPU, unless one says so.
        sizes: T, K, N, R.
        seed: Of the inputs.
        monkeypatch: Of the test.
    """
    method = METHODS[name]
    draws = [method.draw(*sizes, dtype=torch.bfloat16, adapter_dtype=torch.float32, seed=seed + i) for i in range(4)]
    with use_backend(backend.__name__.rpartition(".")[2]), torch.autocast("cpu", torch.bfloat16):
        expected = method.fused(draws[-1])
        monkeypatch.setattr(backend, "begin", lambda device: 0)  # None without a GPU: nothing is replayed
        monkeypatch.setattr(tape, "_known", {})
        monkeypatch.setattr(tape, "calls", {})
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
