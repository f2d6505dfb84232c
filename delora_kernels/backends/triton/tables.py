"""Launch configurations: plain tables by kernel, never keyed on the exact number of tokens.

Chosen so that every configuration compiles for sm_80 and sm_90 without a spill and within their
shared memory (`python -m benchmarks.codegen`); no device has timed them yet. What `python -m
benchmarks.tune` finds faster on a device stands in `tuned.py` and takes their place there.
"""

from functools import lru_cache
from math import gcd
from typing import NamedTuple

import torch

from delora_kernels.backends.triton import tuned

TILES = tuned.TILES
"""(device capability, name in TABLES or GEMM) → rank class or GEMM's way → the fields of its Tiles
or GemmTiles.
"""
GEMM = "rank_gemm"


class Tiles(NamedTuple):
    """A launch: tile sizes along tokens (or rows) and columns, warps, software pipeline stages."""

    tokens: int
    columns: int
    warps: int
    stages: int


TABLES: dict[str, dict[str, Tiles]] = {
    "times_small": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "times_small mixed": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "times_small dropped": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "times_small planes": {"64": Tiles(64, 32, 8, 3), "128": Tiles(64, 32, 8, 3)},
    "times_small fp32": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(32, 32, 8, 2)},
    "token_sums": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "token_sums mixed": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "token_sums dropped": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "token_sums fp32": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 32, 8, 2)},
    "dy_sums": {"16": Tiles(64, 256, 8, 2), "32": Tiles(64, 128, 8, 2)},
    "dy_sums scaled": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2)},
    "dy_sums mixed": {"16": Tiles(64, 64, 8, 2), "32": Tiles(32, 64, 4, 2)},
    "rank_update": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2), "64": Tiles(64, 64, 8, 2)},
    "rank_update mixed": {"16": Tiles(64, 64, 8, 2), "32": Tiles(64, 64, 8, 2), "64": Tiles(64, 32, 4, 2)},
    "rank_update fp32": {"16": Tiles(64, 64, 8, 2), "32": Tiles(64, 64, 8, 2), "64": Tiles(64, 32, 8, 2)},
    "grouped_times_small": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "grouped_times_small mixed": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 8, 2), "128": Tiles(64, 32, 8, 2)},
    "grouped_update": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2)},
    "grouped_update mixed": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 8, 2)},
    "grouped_sums": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "grouped_sums mixed": {"16": Tiles(32, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "grouped_sums dropped": {"16": Tiles(32, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 64, 8, 2)},
    "grouped_sums fp32": {"16": Tiles(64, 64, 4, 3), "64": Tiles(32, 64, 8, 2), "128": Tiles(32, 32, 8, 2)},
    "row_norm": {
        "16": Tiles(32, 128, 8, 4),
        "32": Tiles(32, 128, 8, 4),
        "64": Tiles(32, 64, 4, 4),
        "128": Tiles(32, 64, 8, 3),
        "256": Tiles(32, 32, 4, 3),
    },
    "row_norm mixed": {"32": Tiles(32, 64, 4, 4), "64": Tiles(32, 64, 8, 3)},
}
"""Kernel → rank class (the rank's tile fits it) → tiles. More ranks than the last class holds take
several passes.

"mixed" and "fp32" behind a kernel's name stand for launches that need more registers for the same
tile: factors wider than the 16 bits of the token-sized operand; all in float32. "dropped": a mask,
and one dtype. "planes": wider factors as two or three tensors of bfloat16, which need more shared
memory. Without an entry of its own "fp32" and "dropped" take "mixed"'s, and that the plain one.
"""

HOPPER: dict[str, dict[str, Tiles]] = {
    "times_small": {"16": Tiles(64, 128, 4, 4), "64": Tiles(64, 64, 8, 6), "128": Tiles(64, 64, 4, 3)},
    "times_small mixed": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 4, 4), "128": Tiles(64, 32, 4, 4)},
    "times_small dropped": {"16": Tiles(64, 64, 4, 4), "64": Tiles(64, 64, 8, 4), "128": Tiles(64, 32, 4, 4)},
    "token_sums dropped": {"16": Tiles(64, 64, 4, 4), "64": Tiles(64, 128, 8, 3), "128": Tiles(64, 64, 8, 3)},
    "grouped_sums dropped": {"16": Tiles(32, 64, 4, 3), "64": Tiles(64, 64, 4, 3), "128": Tiles(64, 64, 8, 3)},
    "times_small planes": {"64": Tiles(64, 32, 4, 5), "128": Tiles(64, 32, 4, 4)},
    "token_sums mixed": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 64, 4, 3), "128": Tiles(32, 64, 8, 2)},
    "token_sums": {"16": Tiles(64, 64, 4, 4), "64": Tiles(64, 64, 4, 4), "128": Tiles(64, 64, 4, 3)},
    "dy_sums": {"16": Tiles(64, 256, 8, 4), "32": Tiles(64, 256, 8, 3)},
    "rank_update": {"16": Tiles(64, 64, 4, 3), "32": Tiles(64, 64, 4, 3), "64": Tiles(64, 64, 4, 3)},
    "rank_update mixed": {"16": Tiles(64, 64, 4, 3), "32": Tiles(64, 64, 4, 3), "64": Tiles(64, 32, 4, 3)},
    "dy_sums scaled": {"16": Tiles(64, 128, 4, 3), "32": Tiles(64, 128, 4, 3)},
    "dy_sums mixed": {"16": Tiles(64, 128, 4, 3), "32": Tiles(64, 64, 4, 3)},
    "grouped_times_small": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 128, 4, 3), "128": Tiles(64, 64, 4, 3)},
    "grouped_update": {"16": Tiles(64, 128, 8, 2), "32": Tiles(64, 64, 4, 3)},
    "grouped_sums": {"16": Tiles(64, 64, 4, 3), "64": Tiles(64, 64, 4, 4), "128": Tiles(64, 64, 4, 3)},
    "row_norm": {
        "16": Tiles(32, 128, 8, 4),
        "32": Tiles(32, 256, 8, 4),
        "64": Tiles(32, 256, 8, 4),
        "128": Tiles(32, 128, 8, 5),
        "256": Tiles(32, 64, 8, 5),
    },
    "row_norm mixed": {"32": Tiles(32, 128, 8, 4), "64": Tiles(32, 64, 8, 4)},
}
"""The same for compute capability 9.0, whose wgmma reads both operands where they were loaded to:
elsewhere tiles of that size would not fit the registers.
"""


class GemmTiles(NamedTuple):
    """Our own GEMM: tiles along tokens, columns and the sum, launch, programs of the grid (0: one
    for each tile).
    """

    tokens: int
    columns: int
    inner: int
    warps: int
    stages: int
    programs: int


GEMMS = {"descriptors": GemmTiles(128, 256, 64, 8, 3, 128), "pointers": GemmTiles(128, 128, 64, 8, 3, 0)}
"""How tiles are loaded → tiles.

Descriptors (TMA) are for sm_90 and later, with a persistent grid: the usual layers have a multiple
of 128 tiles, so 128 programs waste no wave and leave a few multiprocessors of an H100 or H200 to
others.
"""


def rank_tile(kernel: str, R: int) -> int:
    """How many ranks one pass of a kernel takes: a power of two, at least 16, a dot's least
    side.
    """
    return min(max(int(limit) for limit in TABLES[kernel]), padded(R))


def cdiv(size: int, block: int) -> int:
    """How many blocks cover `size`."""
    return -(-size // block)


def power_of_2(size: int) -> int:
    """`size`, 1 or more, up to the next power of two."""
    return 1 << (size - 1).bit_length()


def padded(R: int) -> int:
    """R up to the next power of two, at least 16: the least side of a dot."""
    return max(16, power_of_2(R))


def unit(*integers: int) -> int:
    """Return the most elements that these numbers are multiples of, and that make a load of 16
    bytes; 1 where they are multiples of 16, which Triton sees by itself.
    """
    found = gcd(16, *integers)
    return 1 if found == 16 else found


REGISTERS = 255
"""What a thread may have: unless it is told, the compiler takes fewer, to run more programs at a
time, and spills.
"""

MULTIPROCESSORS = 132
"""Of a device that can't be asked: an H200's."""


@lru_cache
def multiprocessors(device: torch.device) -> int:
    """How many programs a device runs side by side, at the least."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).multi_processor_count)
    return MULTIPROCESSORS


SPLIT_TARGET: int | None = None
"""Programs that a reduction is split into whatever the device has room for, or None: for tests."""

IN_FLIGHT = 25_000
"""Bytes that a multiprocessor has to be waiting for at any time: an H200's 4.8 TB/s for the 0.7 µs
that a load takes, over its 132.
"""


def side_by_side(device: torch.device, in_flight: int = 0) -> int:
    """How many programs of a reduction are to run at a time: one a multiprocessor where each has
    IN_FLIGHT bytes in flight, else two.
    """
    return multiprocessors(device) * (1 if in_flight >= IN_FLIGHT else 2)


def dtypes(big: torch.dtype, *small: torch.dtype) -> str:
    """Return what a kernel's name has behind it in TABLES: "fp32", "mixed" where factors are wider
    than `big`, or nothing.
    """
    if big == torch.float32:
        return "fp32"
    return "mixed" if any(dtype != big for dtype in small) else ""


def shipped(name: str, capability: tuple[int, int]) -> dict[str, Tiles]:
    """Return the table of this name for a device of this compute capability, before any tuning."""
    return HOPPER.get(name, TABLES[name]) if capability == (9, 0) else TABLES[name]


def tiles(kernel: str, rank_tile: int, capability: tuple[int, int], dtypes: str = "") -> Tiles:
    """Return the configuration of a kernel for a tile of ranks on a device of this compute
    capability.
    """
    own = {"": (), "fp32": ("fp32", "mixed"), "dropped": ("dropped", "mixed")}.get(dtypes, (dtypes,))
    name = next((f"{kernel} {each}" for each in own if f"{kernel} {each}" in TABLES), kernel)
    limit, entry = next(entry for entry in shipped(name, capability).items() if rank_tile <= int(entry[0]))
    tuned = TILES.get((capability, name), {}).get(limit)
    return entry if tuned is None else Tiles(*tuned)


def lanes(tile: Tiles, dtype: torch.dtype) -> int:
    """Return how many rows apart those are of which one thread reads 16 bytes each: a tile's
    threads stand side by side along its rows.
    """
    row = max(1, tile.columns * dtype.itemsize // 16)
    return max(1, min(tile.tokens, tile.warps * 32 // row))


def gemm_tiles(way: str, capability: tuple[int, int]) -> GemmTiles:
    """Return the configuration of our own GEMM, for the way its tiles are loaded."""
    tuned = TILES.get((capability, GEMM), {}).get(way)
    return GEMMS[way] if tuned is None else GemmTiles(*tuned)


def splits(programs: int, steps: int, wanted: int | None = None) -> int:
    """Into how many parts a reduction of `steps` steps is split when `programs` programs run
    anyway, and `wanted` (two a multiprocessor of an H200) are to.
    """
    target = SPLIT_TARGET or wanted or 2 * MULTIPROCESSORS
    return max(1, min(steps, target // max(1, programs)))
