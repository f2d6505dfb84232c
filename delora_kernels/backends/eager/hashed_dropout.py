"""Dropout masks as a pure function of (seed, row, column): nothing is kept for backward, any rows can be made alone.

splitmix64 (Steele, Lea, Flood: "Fast splittable pseudorandom number generators", OOPSLA 2014) in 64-bit integer torch
ops. One hash decides four neighbouring elements with 16 bits each, so p is met to within 2⁻¹⁷. The seed stays a
tensor: no device is ever synchronised, and a CUDA graph that draws a new seed draws a new mask.
"""

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
    threshold = round(dropout_p * (1 << 16)) - (1 << 15)
    fields = bits.view(torch.int16).view(rows.stop - rows.start, groups * _DECISIONS)[:, :K]
    return fields >= threshold


def _splitmix64(index: Tensor, seed: Tensor) -> Tensor:
    z = (index + 1).mul_(_GAMMA).add_(seed)
    for shift, multiplier in _MIX:
        z.bitwise_xor_(_logical_shift(z, shift)).mul_(multiplier)
    return z.bitwise_xor_(_logical_shift(z, 31))


def _logical_shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)
