"""Launch configurations: plain tables by kernel, never keyed on the exact number of tokens.

Chosen so that every configuration compiles for sm_80 and sm_90 without a spill and within their shared memory
(`python -m benchmarks.codegen`); no device has timed them yet.
"""

from typing import NamedTuple


class Tiles(NamedTuple):
    """A launch: tile sizes along tokens (or rows) and columns, warps, software pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


TABLES: dict[str, dict[str, Tiles]] = {
    "times_small": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "token_sums": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "dy_sums": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2)},
    "rank_update": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2)},
    "row_norm": {"16": Tiles(64, 64, 8, 2)},
}
"""Kernel → rank class (the rank's tile fits it) → tiles. More ranks than the last class holds take several turns."""


def rank_tile(kernel: str, R: int) -> int:
    """How many ranks one turn of a kernel takes: a power of two, at least 16, a dot's least side."""
    widest = max(int(limit) for limit in TABLES[kernel])
    return min(widest, max(16, 1 << (R - 1).bit_length()))


SPLIT_TARGET = 264
"""Programs that a reduction is split into: two for each of an H200's 132 multiprocessors."""


def tiles(kernel: str, rank_tile: int) -> Tiles:
    """The configuration of a kernel for a tile of ranks."""
    return next(found for limit, found in TABLES[kernel].items() if rank_tile <= int(limit))


def splits(programs: int, steps: int) -> int:
    """Into how many parts a reduction of `steps` steps is split when `programs` programs run anyway."""
    return max(1, min(steps, SPLIT_TARGET // max(1, programs)))
