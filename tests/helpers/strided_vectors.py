"""Vectors that lie apart in memory (a column of a matrix) are read as what they are."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import use_backend
from delora_kernels.testing import METHODS


def apart(vector: Tensor) -> Tensor:
    """The same numbers, with others between them."""
    spaced = torch.full((*vector.shape, 2), 77, dtype=vector.dtype)
    spaced[..., 0] = vector
    return spaced[..., 0]


def check_vectors(name: str, backend: str, seed: int) -> None:
    """A method gives the same bits for vectors apart as for vectors in one piece."""
    method = METHODS[name]
    drawn = method.draw(7, 24, 20, 4, dtype=torch.float32, seed=seed)
    moved: dict[str, Any] = dict(drawn)
    for key, value in drawn.items():
        if isinstance(value, Tensor) and (value.dim() == 1 or key in ("bias", "magnitude")):  # or one for each expert
            moved[key] = apart(value)
    with use_backend(backend):
        expected, found = (method.fused(each) for each in (drawn, moved))
    assert expected.keys() == found.keys()
    for key, value in expected.items():
        assert torch.equal(found[key], value), key
