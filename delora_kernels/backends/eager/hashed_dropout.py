"""Dropout masks as a pure function of (seed, row, column): nothing is kept for backward, any rows can be made alone.

splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) in 64-bit integer torch
ops. One hash decides four neighbouring elements with 16 bits each, so p is met to within 2⁻¹⁷. The seed stays a
tensor: no device is ever synchronised, and a CUDA graph that draws a new seed draws a new mask.
"""

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

_DECISIONS = 4
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


def keep_mask(rows: slice, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """The elements that dropout keeps: bool [rows, K] of a [T, K] input.

    Args:
        rows: Rows wanted, with explicit start and stop.
        K: Columns.
        dropout_p: Probability of dropping an element, in [0, 1).
        seed: Tensor, int64, 0-d, on the device of the mask.
    """
    groups = (K + _DECISIONS - 1) // _DECISIONS
    index = torch.arange(rows.start * groups, rows.stop * groups, device=seed.device)
    bits = _splitmix64(index, _splitmix64(torch.zeros_like(index[:1]), seed))
    fields = bits.view(torch.int16).view(rows.stop - rows.start, groups * _DECISIONS)[:, :K]
    return fields >= threshold(dropout_p)


def threshold(dropout_p: float) -> int:
    """The smallest signed 16-bit number that keeps its element."""
    return round(dropout_p * (1 << 16)) - (1 << 15)


class MaskGroup(NamedTuple):
    """Columns of a rank-space tensor that share one mask; seed None: nothing drops there."""

    columns: slice
    dropout_p: float
    seed: Tensor | None

    def drop(self, chunk: Tensor, rows: slice) -> Tensor:
        """Rows of a [T, K] tensor with the dropped elements zeroed, not yet divided by 1 − p."""
        return chunk if self.seed is None else chunk * keep_mask(rows, chunk.shape[1], self.dropout_p, self.seed)


def mask_groups(R: int, ranks: Sequence[int], dropout_p: Sequence[float], seed: Tensor | None) -> list[MaskGroup]:
    """How the R columns of a rank-space tensor are divided among masks; arguments as in the op `project`."""
    if seed is None or not ranks:
        return [MaskGroup(slice(0, R), dropout_p[0], seed)]
    ends = list(accumulate(ranks))
    return [
        MaskGroup(slice(end - rank, end), p, one if p > 0 else None)
        for end, rank, p, one in zip(ends, ranks, dropout_p, seed.unbind(), strict=True)
    ]


def _splitmix64(index: Tensor, seed: Tensor) -> Tensor:
    z = (index + 1).mul_(_GAMMA).add_(seed)
    for shift, multiplier in _MIX:
        z.bitwise_xor_(_logical_shift(z, shift)).mul_(multiplier)
    return z.bitwise_xor_(_logical_shift(z, 31))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
