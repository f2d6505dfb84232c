"""The bits of dropout masks against splitmix64 in Python's own integers: any rows, any number of
columns.
"""

import pytest
import torch

from delora_kernels.backends.dropout import KeepMask

MASK = (1 << 64) - 1
P = 0.3


def splitmix64(index: int, seed: int) -> int:
    """The output of the generator of that seed after `index` + 1 steps."""
    z = (seed + (index + 1) * 0x9E3779B97F4A7C15) & MASK
    z = ((z ^ z >> 30) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ z >> 27) * 0x94D049BB133111EB) & MASK
    return z ^ z >> 31


def kept(row: int, column: int, K: int, seed: int) -> bool:
    """Whether 16 bits of the hash of the element's group of four, as a signed number, reach p's
    share of them.
    """
    bits = splitmix64(row * -(-K // 4) + column // 4, splitmix64(0, seed & MASK)) >> 16 * (column % 4) & 0xFFFF
    return (bits ^ 0x8000) >= round(P * 65536)


@pytest.mark.parametrize("K", [1, 4, 7, 30])
def test_bits(K: int, seed: int) -> None:
    dropout_seed = (seed * 0x9E3779B97F4A7C15 & MASK) - (1 << 63)
    mask = KeepMask(K, P, torch.tensor(dropout_seed))
    for rows in (slice(0, 9), slice(3, 5), slice(1_000_000, 1_000_020), slice(7, 7)):
        expected = [[kept(row, column, K, dropout_seed) for column in range(K)] for row in range(rows.start, rows.stop)]
        assert torch.equal(mask(rows), torch.tensor(expected, dtype=torch.bool).view(-1, K))


def test_dropped_nan_and_inf_show(seed: int) -> None:
    x = torch.tensor([[torch.nan, torch.inf, 1.0] * 10])
    mask = KeepMask(30, P, torch.tensor(seed))
    assert torch.equal(mask.drop(x, slice(0, 1)).isnan(), x.isnan() | (x.isinf() & ~mask(slice(0, 1))))
