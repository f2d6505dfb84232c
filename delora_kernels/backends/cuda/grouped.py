"""The kernels for rows sorted by expert as functions of tensors: see `GroupedStages`."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.launch import launch, rows, splits, tiles
from delora_kernels.backends.dropout import MaskGroup, mask_arguments


def grouped_times_small(
    x: Tensor, small: Tensor, offsets: Tensor, factor: float, dtype: torch.dtype, group: MaskGroup | None = None
) -> Tensor:
    """`GroupedStages.times_small`: one read of x for each 64 ranks."""
    (T, C), (E, _, R) = x.shape, small.shape
    out = x.new_empty((T, R), dtype=dtype)
    if out.numel():
        seed, limit, inverse = mask_arguments(group)
        launch(
            "grouped_times_small", rows(x), small[0], small.stride(0), *_where(offsets), out, T, C, R, E, seed, limit,
            factor * inverse,
        )  # fmt: skip
    return out


def grouped_update(
    out: Tensor, h: Tensor, small: Tensor, offsets: Tensor, bias: Tensor | None = None, group: MaskGroup | None = None
) -> None:
    """`GroupedStages.update`: one read and one write of out."""
    (T, C), (E, R, _) = out.shape, small.shape
    if out.numel():
        (seed, limit, inverse), bias = mask_arguments(group), None if bias is None else rows(bias)
        launch(
            "grouped_update", out, rows(h), small[0], small.stride(0), bias, *_where(offsets), T, C, R, E, inverse,
            seed, limit,
        )  # fmt: skip


def grouped_sums(
    x: Tensor, h: Tensor | None, offsets: Tensor, sums: bool = False, group: MaskGroup | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """`GroupedStages.sums`: one read of x for each 64 ranks, and where an expert has many rows, a
    launch that adds its parts.
    """
    (T, C), E, R = x.shape, len(offsets), 0 if h is None else h.shape[1]
    new = x.new_zeros if T * C == 0 else x.new_empty
    product = None if h is None else new((E, R, C), dtype=torch.float32)
    summed = new((E, C), dtype=torch.float32) if sums else None
    if T * C:
        part = -(-tiles(T) // splits(tiles(C) * max(1, tiles(R)), tiles(T))) * _STEP
        width = (0 if h is None else R * C) + (C if sums else 0)
        parts = x.new_empty((2 * T // part, width), dtype=torch.float32) if part < T else None
        seed, limit, inverse = mask_arguments(group)
        h = None if h is None else rows(h)
        where = _where(offsets)
        launch(
            "grouped_sums", rows(x), h, *where, product, summed, parts, T, C, R, E, part, seed, limit, inverse
        )  # fmt: skip
        if parts is not None:
            launch("grouped_total", *where, parts, product, summed, T, C, R, E, part)
    return product, summed


_STEP = 64
"""Rows that a block of the sums takes at least."""


def _where(offsets: Tensor) -> tuple[Tensor, bool]:
    """Return how kernels take the offsets."""
    return offsets.contiguous(), offsets.dtype == torch.int64
