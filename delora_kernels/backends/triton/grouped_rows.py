"""What the kernels for rows sorted by expert share: how a program finds its tile of one expert's
rows, and how such a launch is planned.

Nobody waits for the offsets: as many programs start as the worst division of the rows asks for, and
each looks through the offsets for its tile. What is left over has no rows.
"""

from typing import Any

import torch
import triton
import triton.language as tl

from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import (
    INTERPRETED,
    Record,
    dot_split,
    dot_split_in_rank,
    planned,
    precision,
    record,
)
from delora_kernels.backends.triton.tables import cdiv, dtypes, power_of_2, rank_tile, tiles


@triton.jit
def cut(OFFSETS, T, E, size, LEAST: tl.constexpr, BE: tl.constexpr):
    """Cut the experts' rows into tiles of `size` rows: return e < BE, where e's rows begin and end,
    and the number of its tiles, at least LEAST. e = E stands for the rows that are nobody's.
    """
    e = tl.arange(0, BE)
    ends = tl.minimum(tl.load(OFFSETS + e, e < E, 0).to(tl.int64), T)
    begins = tl.minimum(tl.load(OFFSETS + e - 1, (e > 0) & (e <= E), 0).to(tl.int64), T)
    begins, ends = tl.where(e > E, T, tl.maximum(begins, 0)), tl.where(e >= E, T, ends)
    counts = tl.maximum((ends - begins + size - 1) // size, tl.where(e < E, LEAST, 0).to(tl.int64))
    return e, begins, ends, counts


@triton.jit
def tile_of(tile, e, begins, ends, counts, size):
    """Return the expert of a tile, its first row, and where the expert's rows end; no rows if there
    is no such tile.
    """
    upto = tl.cumsum(counts, 0)
    expert = tl.sum((upto <= tile).to(tl.int64), 0)
    mine = e == expert
    first = tl.sum(tl.where(mine, begins + (tile - upto + counts) * size, 0), 0)
    return expert, first, tl.sum(tl.where(mine, ends, 0), 0)


@planned
def plan(
    kernel: Any, T: int, E: int, integers: tuple[int, ...], big: torch.dtype, small: torch.dtype, device: torch.device,
    tf32: bool, present: tuple[tuple[str, bool], ...],
) -> tuple[Record, tuple[int, int], int]:  # fmt: skip
    """Return the record of a launch, its programs across columns and ranks, and its rows of a tile.

    Args:
        kernel: In TABLES by its name.
        T, E: Rows, experts.
        integers: As the kernel takes them from C on; C and R first.
        big, small: Dtypes of the token-sized operand, or of the output of an update, and of the
            small ones.
        device: Theirs.
        tf32: Of the product.
        present: What the launch has besides, by the names of the kernel's constants.
    """
    C, R, *_ = integers
    name = kernel.fn.__name__.removesuffix("_kernel")
    how = dot_split_in_rank(small, small, big) if name == "grouped_update" else dot_split(big, small)
    BR = rank_tile(name, max(1, R))
    kinds = dtypes(big, small) or ("dropped" if dict(present).get("DROP", False) else "")
    tile = tiles(name, BR, capability(device), kinds)
    made = record(
        kernel, integers, **dict(present),
        HOW=how, PRECISION=precision(how, tf32), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, BE=power_of_2(E + 1), num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return made, (cdiv(C, tile.columns), max(1, cdiv(R, BR))), tile.tokens


def most_tiles(T: int, groups: int, size: int) -> int:
    """Return the most tiles of `size` rows that T rows make in so many groups."""
    return (T + groups * (size - 1)) // size
