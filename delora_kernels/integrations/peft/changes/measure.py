"""ΔM, ΔD and norms of a weight before and after, a few rows at a time, in float64 (float32 on
Apple's GPUs).

Of each vector of W (a row, or a column) four sums are kept, ‖w‖², ‖w'‖², ‖w' − w‖² and
⟨w' − w, w' + w⟩, from which small changes come out without cancellation:

    ‖w'‖ − ‖w‖ = ⟨w' − w, w' + w⟩ / (‖w'‖ + ‖w‖)
    1 − cos(w', w) = (‖w' − w‖² − (‖w'‖ − ‖w‖)²) / (2 ‖w'‖ ‖w‖)
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

AXES = ("output", "input")
"""Whose vectors are measured: one for each output feature, the rows of nn.Linear's weight, or one
for each input feature, its columns.
"""

Step = Callable[[Tensor, Tensor, slice], Tensor]
"""(rows so far, the same rows of the base, which rows) → these rows with one adapter more."""

_CHUNK_ELEMENTS = 1 << 20
"""Elements of W that are there in float64 at a time: 8 MiB, a few times over."""


class Measured(NamedTuple):
    """What `measured` finds, as in `LayerChange`."""

    magnitude: float
    direction: float
    update_norm: float
    weight_norm: float
    mean_length: float
    vectors: int
    zero_vectors: int


def measured(before: Tensor, base: Tensor, steps: list[Step], axis: str) -> Measured:
    """Measure what became of a weight.

    Args:
        before: W [N, K], any float dtype.
        base: What `steps` begin from, [N, K]: W itself, or what it has become without them.
        steps: The adapters, in the order in which they act.
        axis: One of `AXES`.
    """
    over = 1 if axis == "output" else 0
    parts: list[Tensor] = []
    N, K = base.shape
    for start in range(0, N, size := max(1, _CHUNK_ELEMENTS // max(1, K))):
        rows = slice(start, min(start + size, N))
        own = moved = wide(base[rows])
        for step in steps:
            moved = step(moved, own, rows)
        w = own if before is base else wide(before[rows]).to(own.device)
        difference = moved - w
        sums = [w.square(), moved.square(), difference.square(), difference * (moved + w)]
        parts.append(torch.stack([each.sum(over) for each in sums]))
    w2, moved2, d2, along = torch.cat(parts, 1) if over == 1 else torch.stack(parts).sum(0)
    length, new_length = w2.sqrt(), moved2.sqrt()
    both = length + new_length
    stretch = along / both.masked_fill(both == 0, 1)
    zero = (length == 0) | (new_length == 0)
    turn = (d2 - stretch.square()).clamp(min=0) / (2 * length * new_length).masked_fill(zero, 1)
    return Measured(
        magnitude=float(stretch.abs().mean()),
        direction=float(turn[~zero].mean()),
        update_norm=float(d2.sum().sqrt()),
        weight_norm=float(w2.sum().sqrt()),
        mean_length=float(length.mean()),
        vectors=length.numel(),
        zero_vectors=int(zero.sum()),
    )


def wide(tensor: Tensor) -> Tensor:
    """Return a tensor in the dtype in which changes are measured."""
    return tensor.detach().to(wide_dtype(tensor))


def wide_dtype(tensor: Tensor) -> torch.dtype:
    """Return float64, where there is such a dtype: Apple's GPUs have none."""
    return torch.float32 if tensor.device.type == "mps" else torch.float64
