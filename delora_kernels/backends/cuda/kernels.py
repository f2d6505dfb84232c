"""The token-sized kernels as functions of tensors: what they allocate, how they split their
sums.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from delora_kernels.backends.cuda.launch import DTYPES, launch, rows, splits, tiles
from delora_kernels.backends.dropout import MaskGroup, mask_arguments, threshold
from delora_kernels.backends.library_gemm import DyParts, WrittenTerm


def times_small(
    x: Tensor, small: Tensor, dtype: torch.dtype, group: MaskGroup | None = None, column: Tensor | None = None
) -> Tensor:
    """x (column ⊙ small) → [T, R] in `dtype`: `Stages.times_small`."""
    small = small if column is None else small * column[:, None]
    groups = None if group is None else [group._replace(columns=slice(0, small.shape[1]))]
    return add_parts(times_small_parts(x, small, dtype, groups), dtype)


def times_small_parts(
    x: Tensor, small: Tensor, dtype: torch.dtype, groups: Sequence[MaskGroup] | None = None
) -> Tensor:
    """Return the parts of x small: `Stages.times_small_parts`; small in x's dtype or float32."""
    (T, C), R = x.shape, small.shape[1]
    if T * R * C == 0:
        return x.new_zeros((1, T, R), dtype=dtype)
    x, groups = rows(x), groups or [MaskGroup(slice(0, R), 0.0, None)]
    blocks = [small[:, group.columns] for group in groups]
    parts = splits_of_times_small(T, C, [block.shape[1] for block in blocks])
    out = x.new_empty((parts * T, R), dtype=dtype if parts == 1 else torch.float32)
    for block, group in zip(blocks, groups, strict=True):
        seed, limit, factor = mask_arguments(group)
        launch("times_small", x, block, out[:, group.columns], T, C, block.shape[1], parts, seed, limit, factor)
    return out.view(parts, T, R)


def splits_of_times_small(T: int, C: int, ranks: Sequence[int]) -> int:
    """Into how many parts the sum over C of x [T, C] times blocks of these ranks is split."""
    return splits(tiles(T) * sum(map(tiles, ranks)), tiles(C))


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_p parts[p] in `dtype`, in their order; parts [P, ...] float32, contiguous. One part is
    returned as it is.
    """
    if len(parts) == 1 or parts[0].numel() == 0:
        return parts[0].to(dtype)
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    launch("add_parts", parts, len(parts), out.numel(), out, DTYPES[dtype])
    return out


MOST_RANKS_OF_TERM = 64
"""All of h's columns that one block of `token_sums` holds."""


def takes_term(x: Tensor, h: Tensor, small: Tensor, group: MaskGroup) -> bool:
    """Whether `token_sums` can write the rank-R term on its way: with all of h's columns in one
    block.
    """
    return h.dtype == small.dtype and h.shape[1] <= MOST_RANKS_OF_TERM


def token_sums(
    x: Tensor, h: Tensor | None, factor: float = 1.0, *, sums: bool = False, y: Tensor | None = None,
    group: MaskGroup | None = None, transposed: bool = False, ranks: int | None = None, term: WrittenTerm | None = None,
) -> DyParts:  # fmt: skip
    """As `TokenSums`: h is in x's dtype or float32, y in x's dtype."""
    (T, C), R = x.shape, 0 if h is None else h.shape[1]
    ranks = R if ranks is None else ranks
    small, out = (None, None) if term is None else term
    seed, limit, inverse = mask_arguments(group)
    parts = splits(tiles(C) * max(1, tiles(R)), tiles(T))
    shape = (parts, ranks, C) if transposed else (parts, C, ranks)
    new = x.new_zeros if T * C == 0 else x.new_empty
    found = DyParts(
        None,
        None if h is None else new(shape, dtype=torch.float32),
        new((parts, C), dtype=torch.float32) if sums else None,
        None if y is None else new((parts, C), dtype=torch.float32),
    )
    if T * C:
        launch(
            "token_sums", rows(x), None if h is None else rows(h), None if y is None else rows(y), small, out,
            *found[1:], T, C, R, ranks, parts, transposed, seed, limit, factor * inverse,
        )  # fmt: skip
    return found


def rank_update(
    base: Tensor | None, h: Tensor, small: Tensor, scale: float, out: Tensor, *, column: Tensor | None = None,
    extra: Tensor | None = None, bias: Tensor | None = None, group: MaskGroup | None = None, mask_base: bool = False,
) -> Tensor:  # fmt: skip
    """out = c ⊙ (mask ⊙ base + scale · mask ⊙ (h small)) + extra + bias, rounded once; `out` may be
    `base`.

    Args:
        base: [T, C] in out's dtype; or None.
        h: [T, R], out's dtype or float32.
        small: [R, C], any strides, in h's dtype.
        scale: Factor of the term; 1 / (1 − p) of a mask is the caller's.
        out: [T, C].
        column: c [C] float32, or None.
        extra: [T, C] in out's dtype, or None.
        bias: [C] or None.
        group: The mask of the term, or None.
        mask_base: Whether it masks base too.
    """
    (T, C), R = out.shape, h.shape[1]
    if T * C:
        seed, limit, _ = mask_arguments(group)
        extra = None if extra is None else rows(extra)
        launch(
            "rank_update", base, rows(h), small, column, extra, bias, out, T, C, R, scale, seed, limit, mask_base
        )  # fmt: skip
    return out


def scale_matrix(matrix: Tensor, factor: Tensor, by_row: bool) -> Tensor:
    """matrix [M, C] ⊙ factor, a float32 vector of rows [M] or of columns [C]; laid out as the
    matrix is.
    """
    if matrix.stride(0) == 1 and matrix.stride(1) > 1:
        return scale_matrix(matrix.t(), factor, not by_row).t()
    (M, C), out = matrix.shape, torch.empty_like(matrix, memory_format=torch.contiguous_format)
    if M * C:
        launch("scaled", rows(matrix), factor, out, M, C, by_row)
    return out


def dropout_mask(T: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Return the elements of a [T, K] input that are kept, bool: the bits of the eager backend."""
    mask = seed.new_empty((T, K), dtype=torch.bool)
    if T * K:
        launch("dropout_mask", seed, threshold(dropout_p), mask, T, K)
    return mask


def drop(x: Tensor, dropout_p: float, seed: Tensor) -> tuple[Tensor, Tensor]:
    """drop(x) and x − drop(x), [T, K] each, from one read of x."""
    (T, K), x = x.shape, rows(x)
    dropped, rest = x.new_empty((T, K)), x.new_empty((T, K))
    if T * K:
        launch("drop", x, seed, threshold(dropout_p), 1 / (1 - dropout_p), dropped, rest, T, K)
    return dropped, rest
