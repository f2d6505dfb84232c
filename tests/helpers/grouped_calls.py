"""Calls of functions for experts on small random arguments: y and gradients, whatever the experts
have of the rows.
"""

from collections.abc import Callable
from typing import Any

import torch
from reference_calls import Maker
from torch import Tensor

E, K, N, R = 4, 8, 12, 3
TRAINED = ("x", "weight", "A", "B", "bias")
ROWS: dict[str, list[int]] = {
    "some": [3, 1, 4, 2],
    "empty": [0, 5, 0, 3],
    "one has all": [0, 0, 9, 0],
    "no rows": [0, 0, 0, 0],
    "one row": [0, 1, 0, 0],
}
"""How many rows each expert has."""


def made_of(maker: Maker, rows: list[int], nobody: int = 2, dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    """Arguments, with rows of no expert at the end."""
    T = sum(rows) + nobody
    sizes = {"x": (T, K), "weight": (E, N, K), "A": (E, R, K), "B": (E, N, R), "bias": (E, N)}
    made: dict[str, Any] = {name: maker.tensor(*size).to(dtype) for name, size in sizes.items()}
    return made | {"offsets": torch.tensor(rows).cumsum(0), "scale": 0.7}


def step(function: Callable[..., Tensor], made: dict[str, Any], trained: Any = TRAINED) -> dict[str, Tensor]:
    """y and the gradients of what trains."""
    leaves = {name: made[name].detach().clone().requires_grad_() for name in trained if made.get(name) is not None}
    y = function(**made | leaves)
    dy = torch.linspace(-1, 2, y.numel()).reshape(y.shape).bfloat16().to(y.dtype)  # the same in every dtype
    grads = torch.autograd.grad(y, list(leaves.values()), dy, allow_unused=True) if leaves else ()
    zero = {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    return {"y": y.detach()} | {n: zero[n] if g is None else g for n, g in zip(leaves, grads, strict=True)}


def assert_close(ours: dict[str, Tensor], theirs: dict[str, Tensor], limit: float = 1e-12) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        largest = float(value.abs().max()) if value.numel() else 0.0
        assert ours[name].shape == value.shape
        assert ours[name].dtype == value.dtype
        assert not value.numel() or float((ours[name] - value).abs().max()) <= limit * largest, name
