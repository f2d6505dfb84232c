"""Dropout masks as a pure function of (seed, row, column): nothing is kept for backward, any rows
can be made alone.

splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) in
64-bit integer torch ops. One hash decides four neighbouring elements with 16 bits each, so p is met
to within 2⁻¹⁷. The seed stays a tensor: no device is ever synchronised, and a CUDA graph that draws
a new seed draws a new mask.
"""

from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from delora_kernels.op_arguments import Masks

_DECISIONS = 4
_GAMMA = 0x9E3779B97F4A7C15 - (1 << 64)
_MIX = ((30, 0xBF58476D1CE4E5B9 - (1 << 64)), (27, 0x94D049BB133111EB - (1 << 64)))


class KeepMask:
    """The elements of a [T, K] input that dropout keeps, some rows at a time.

    Args:
        K: Columns.
        dropout_p: Probability of dropping an element, in [0, 1).
        seed: Tensor, int64, 0-d, on the device of the mask.
    """

    def __init__(self, K: int, dropout_p: float, seed: Tensor) -> None:
        self._K, self._threshold = K, threshold(dropout_p)
        self._groups = (K + _DECISIONS - 1) // _DECISIONS
        first = seed.reshape(1) + _GAMMA
        self._key = _mix(first, torch.empty_like(first))
        self._steps = first.new_empty(0)  # (index + 1) · γ from row 0 on: most chunks of rows are alike

    def __call__(self, rows: slice) -> Tensor:
        """bool [rows, K]; `rows` has explicit start and stop."""
        count = rows.stop - rows.start
        n = count * self._groups
        if len(self._steps) < n:
            self._steps = torch.arange(1, n + 1, device=self._key.device).mul_(_GAMMA)
        z = self._steps[:n] + (self._key + _signed(rows.start * self._groups * _GAMMA))
        fields = _mix(z, torch.empty_like(z)).view(torch.int16).view(count, self._groups * _DECISIONS)
        return fields[:, : self._K] >= self._threshold

    def drop(self, chunk: Tensor, rows: slice) -> Tensor:
        """`chunk`, these rows of the input, with the dropped elements zeroed, not yet divided by 1
        − p.
        """
        return times_mask(chunk, self(rows))


def times_mask(values: Tensor, mask: Tensor, out: Tensor | None = None) -> Tensor:
    """values ⊙ mask: NaN and Inf show where they are dropped. torch multiplies by bytes faster than
    by bools.
    """
    return torch.mul(values, mask.view(torch.uint8), out=out)


def threshold(dropout_p: float) -> int:
    """Return the smallest signed 16-bit number that keeps its element."""
    return round(dropout_p * (1 << 16)) - (1 << 15)


class MaskGroup(NamedTuple):
    """Columns of a rank-space tensor that share one mask; seed None: nothing drops there."""

    columns: slice
    dropout_p: float
    seed: Tensor | None

    def mask(self, K: int) -> KeepMask | None:
        """Return the mask of a [T, K] input; None: nothing drops."""
        return None if self.seed is None else KeepMask(K, self.dropout_p, self.seed)


def mask_arguments(group: MaskGroup | None) -> tuple[Tensor | None, int, float]:
    """Return what a kernel takes of a mask: seed, threshold and 1 / (1 − p)."""
    if group is None or group.seed is None:
        return None, 0, 1.0
    return group.seed, threshold(group.dropout_p), 1 / (1 - group.dropout_p)


def mask_groups(R: int, masks: Masks) -> list[MaskGroup]:
    """How the R columns of a rank-space tensor are divided among masks."""
    ranks, dropout_p, seed = masks
    if seed is None or not ranks:
        return [MaskGroup(slice(0, R), dropout_p[0], seed)]
    ends = list(accumulate(ranks))
    return [
        MaskGroup(slice(end - rank, end), p, one if p > 0 else None)
        for end, rank, p, one in zip(ends, ranks, dropout_p, seed.unbind(), strict=True)
    ]


def _mix(z: Tensor, scratch: Tensor) -> Tensor:
    """splitmix64's output for its states z, in place."""
    for shift, multiplier in _MIX:
        z.bitwise_xor_(_logical_shift(z, shift, scratch)).mul_(multiplier)
    return z.bitwise_xor_(_logical_shift(z, 31, scratch))


def _logical_shift(z: Tensor, bits: int, out: Tensor) -> Tensor:
    return torch.bitwise_right_shift(z, bits, out=out).bitwise_and_((1 << (64 - bits)) - 1)


def _signed(number: int) -> int:
    """Return the int64 that has the lowest 64 bits of `number`."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
