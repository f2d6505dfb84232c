"""A mixture's factors side by side, [A; G; A⁰] and [B | −γ B⁰], in one launch instead of a copy for
each tensor.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.launch import launch, record
from delora_kernels.backends.triton.tables import cdiv, power_of_2
from delora_kernels.op_arguments import ExpertFactors

BLOCK = 2048
"""Elements that a program copies."""

COLUMNS = 128
"""Of [B | −γ B⁰] in one program, at the most."""


@triton.jit
def _copy(FROM, TO, block, size, BLOCK: tl.constexpr):
    i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(TO + i, tl.load(FROM + i, i < size, 0.0).to(TO.dtype.element_ty), i < size)


@triton.jit
def stack_factors_kernel(
    A, G, A0, B, B0, RESIDUAL, ROWS, COLUMNS,
    size_a, size_g, size_0, N, E, R, starts, rank_0,
    WITH_A: tl.constexpr, WITH_G: tl.constexpr, WITH_A0: tl.constexpr, WITH_B0: tl.constexpr,
    BLOCK: tl.constexpr, BN: tl.constexpr, BC: tl.constexpr,
):  # fmt: skip
    """BLOCK elements of A, then of G, then of A⁰, which follow each other in ROWS; then tiles [BN,
    BC] of COLUMNS.
    """
    block = tl.program_id(0)
    blocks_a, blocks_g, blocks_0 = tl.cdiv(size_a, BLOCK), tl.cdiv(size_g, BLOCK), tl.cdiv(size_0, BLOCK)
    if WITH_A:
        if block < blocks_a:
            _copy(A, ROWS, block, size_a, BLOCK)
    block -= blocks_a
    if WITH_G:
        if (block >= 0) & (block < blocks_g):
            _copy(G, ROWS + size_a, block, size_g, BLOCK)
    block -= blocks_g
    if WITH_A0:
        if (block >= 0) & (block < blocks_0):
            _copy(A0, ROWS + size_a + size_g, block, size_0, BLOCK)
    block -= blocks_0
    if block >= 0:
        trained, all_columns = E * R, E * R + starts * rank_0
        across = tl.cdiv(all_columns, BC)
        n = (block // across).to(tl.int64) * BN + tl.arange(0, BN)[:, None]
        c = (block % across) * BC + tl.arange(0, BC)[None, :]
        live = (n < N) & (c < trained)
        value = tl.load(B + (c // R * N + n) * R + c % R, live, 0.0).to(tl.float32)
        if WITH_B0:
            q = tl.maximum(c - trained, 0)
            start = (n < N) & (c >= trained) & (c < all_columns)
            b = tl.load(B0 + (q // rank_0 * N + n) * rank_0 + q % rank_0, start, 0.0).to(tl.float32)
            value += b * -tl.load(RESIDUAL + q // rank_0, (c >= trained) & (c < all_columns), 0.0)
        inside = (n < N) & (c < all_columns)
        tl.store(COLUMNS + n * all_columns + c, value.to(COLUMNS.dtype.element_ty), inside)


def stack_factors(factors: ExpertFactors, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Stack [A; G; A⁰] and [B | −γ B⁰] in `dtype`."""
    *firsts, B, frozen_B, residual = factors
    parts = [None if part is None else part.contiguous() for part in firsts]
    there = [part for part in parts if part is not None]
    rows = B.new_empty((sum(map(len, there)), there[0].shape[1]) if there else 0, dtype=dtype)
    E, N, R = B.shape
    starts, _, rank_0 = (0, N, 1) if frozen_B is None else frozen_B.shape
    total = E * R + starts * rank_0
    columns = B.new_empty((N, total), dtype=dtype)
    BC = min(COLUMNS, power_of_2(total))
    sizes = [0 if part is None else part.numel() for part in parts]
    programs = sum(cdiv(size, BLOCK) for size in sizes) + cdiv(N, BLOCK // BC) * cdiv(total, BC)
    start = None if frozen_B is None or residual is None else (frozen_B.contiguous(), residual.contiguous())
    made = record(
        stack_factors_kernel, (*sizes, N, E, R, starts, rank_0),
        WITH_A=parts[0] is not None, WITH_G=parts[1] is not None, WITH_A0=parts[2] is not None,
        WITH_B0=start is not None,
        BLOCK=BLOCK, BN=BLOCK // BC, BC=BC,
    )  # fmt: skip
    launch(made, (programs,), (*parts, B.contiguous(), *(start or (None, None)), rows if there else None, columns))
    return rows, columns
