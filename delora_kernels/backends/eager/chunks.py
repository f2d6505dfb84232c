"""Row chunks: how plain torch sees a big tensor in a wider dtype without a copy of it."""

from collections.abc import Iterator

import torch
from torch import Tensor

CPU_ELEMENTS = 1 << 17
"""Elements of one chunk for each thread of a CPU: 512 KiB in float32, small enough for a core's
cache.
"""

DEVICE_ELEMENTS = 1 << 22
"""Elements of one chunk on other devices: 16 MiB in float32, enough to keep one busy for longer
than a launch takes.
"""

WHOLE_ELEMENTS = 3 << 17
"""Elements up to which a CPU's chunks grow where they are views: 1.5 MiB in float32. Where there is
no copy, each cut costs more, a wait of the threads for each other, than caches that cores share.
"""


def is_one_chunk(dtype: torch.dtype, matrix: Tensor) -> bool:
    """Whether `matrix` is of `dtype` and no more than one chunk: whoever asks needs no loop."""
    return matrix.dtype == dtype and matrix.numel() <= _elements(matrix, views=True)


def row_chunks(matrix: Tensor, views: bool = False) -> Iterator[slice]:
    """Slices that cut the rows of `matrix` into chunks; `views`: that are not copied."""
    rows, columns = matrix.shape
    step = max(1, _elements(matrix, views) // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _elements(matrix: Tensor, views: bool) -> int:
    if not matrix.is_cpu:
        return DEVICE_ELEMENTS
    elements = CPU_ELEMENTS * torch.get_num_threads()
    return max(elements, min(4 * elements, WHOLE_ELEMENTS)) if views else elements


def chunks_in(dtype: torch.dtype, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row chunks of `matrix` in `dtype`: views where that is its dtype, else one scratch chunk,
    refilled each time.
    """
    scratch = None
    for rows in row_chunks(matrix, views=matrix.dtype == dtype):
        chunk = matrix[rows]
        if matrix.dtype != dtype:
            scratch = torch.empty(chunk.shape, dtype=dtype, device=matrix.device) if scratch is None else scratch
            chunk = scratch[: chunk.shape[0]].copy_(chunk)
        yield rows, chunk
