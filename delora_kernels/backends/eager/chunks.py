"""Row chunks that stay in cache: how plain torch sees a big tensor in a wider dtype without a copy of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

CHUNK_ELEMENTS = 1 << 17
"""Elements of one chunk: 512 KiB in float32, small enough for a core's cache."""


def row_chunks(rows: int, columns: int) -> Iterator[slice]:
    """Slices that cut `rows` rows of `columns` elements into chunks."""
    step = max(1, CHUNK_ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def chunks_in(dtype: torch.dtype, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row chunks of `matrix` in `dtype`: views where that is its dtype, else one scratch chunk, refilled each time."""
    scratch = None
    for rows in row_chunks(*matrix.shape):
        chunk = matrix[rows]
        if matrix.dtype != dtype:
            scratch = torch.empty(chunk.shape, dtype=dtype, device=matrix.device) if scratch is None else scratch
            chunk = scratch[: chunk.shape[0]].copy_(chunk)
        yield rows, chunk
