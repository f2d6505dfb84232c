"""Partial sums added in a fixed order, so that results repeat bit for bit: what follows a split
reduction, in a launch.

`add_parts` adds the parts of any tensor. `finish_dy` adds all that the reads of dy left in parts,
and makes of it what the op `expand_backward` promises: dv in its dtype, dB̂ with DoRA's c, dm
divided, the bias's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.library_gemm import DyParts
from delora_kernels.backends.triton.launch import launch

BLOCK = 1024
"""Elements that a program adds up."""


@triton.jit
def total(PARTS, i, parts, M, inside):
    """Σ_p PARTS[p, i] of parts with M elements each, in their order; i is int64."""
    total = tl.zeros(i.shape, tl.float32)
    for _ in range(parts):
        total += tl.load(PARTS + i, inside, 0.0)
        i += M
    return total


@triton.jit
def add(PARTS, OUT, i, parts, M):
    """OUT[i] = Σ_p PARTS[p, i] where i < M, rounded once to OUT's dtype."""
    tl.store(OUT + i, total(PARTS, i, parts, M, i < M).to(OUT.dtype.element_ty), i < M)


@triton.jit(do_not_specialize=["parts", "M"])
def add_parts_kernel(PARTS, OUT, parts, M, BLOCK: tl.constexpr):
    """BLOCK elements of OUT [M] = Σ_p PARTS[p]."""
    add(PARTS, OUT, tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), parts, M)


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_p parts[p] in `dtype`; parts [P, ...] float32, contiguous. A single float32 part is
    returned as it is.
    """
    if len(parts) == 1:
        return parts[0].to(dtype)
    out = parts.new_empty(parts.shape[1:], dtype=dtype)
    if out.numel():
        M = out.numel()
        launch(add_parts_kernel, (triton.cdiv(M, BLOCK),), (parts, out), (len(parts), M), BLOCK=BLOCK)
    return out


@triton.jit(do_not_specialize=["elements", "dv_parts", "parts"])
def finish_dy_kernel(
    DV_PARTS, PRODUCT_PARTS, SUM_PARTS, DOT_PARTS, B, COLUMN, DIVISOR, DV, DB, SUMS, DM,
    dv_parts, parts, elements, N, R, stride_bn, stride_br,
    WITH_DV: tl.constexpr, WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, WITH_DOTS: tl.constexpr,
    WITH_COLUMN: tl.constexpr, WITH_B: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Programs up to N / BN: BN rows of dB̂ [N, R], Σ_t dy and dm; those after: BLOCK elements of
    dv.
    """
    rows = (N + BN - 1) // BN
    if tl.program_id(0) < rows:
        n = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
        if WITH_SUMS:
            tl.store(SUMS + n, total(SUM_PARTS, n, parts, N, n < N), n < N)
        if WITH_DOTS:
            dots = total(DOT_PARTS, n, parts, N, n < N)
        if WITH_PRODUCT:
            r = tl.arange(0, BR)
            inside = (n[:, None] < N) & (r[None, :] < R)
            product = total(PRODUCT_PARTS, n[:, None] * R + r[None, :], parts, N * R, inside)
            if WITH_DOTS:
                if WITH_B:  # what was kept is x Wᵀ: the rest of u is in dB̂ already
                    b = tl.load(B + n[:, None] * stride_bn + r[None, :] * stride_br, inside, 0.0).to(tl.float32)
                    dots += tl.sum(product * b, 1)
            if WITH_COLUMN:
                product *= tl.load(COLUMN + n, n < N, 0.0)[:, None]
            tl.store(DB + n[:, None] * R + r[None, :], product, inside)
        if WITH_DOTS:
            divisor = tl.load(DIVISOR + n, n < N, 1.0).to(tl.float32)
            dm = tl.where(divisor == 0.0, 0.0, dots / tl.where(divisor == 0.0, 1.0, divisor))
            tl.store(DM + n, dm, n < N)
    if WITH_DV:
        if tl.program_id(0) >= rows:
            i = (tl.program_id(0) - rows).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
            add(DV_PARTS, DV, i, dv_parts, elements)


def finish_dy(
    parts: DyParts, out: DyParts, column: Tensor | None, B_hat: Tensor | None, divisor: Tensor | None
) -> None:
    """Write to `out` what `Stages.finished` promises, in one launch."""
    count, N = next((found.shape[:2] for found in parts[1:] if found is not None), (0, 0))
    R = 0 if parts.product is None else parts.product.shape[2]
    BR = max(16, triton.next_power_of_2(R))
    BN = BLOCK // BR
    elements = 0 if out.dv is None else out.dv.numel()
    dv_count, strides = 0 if parts.dv is None else len(parts.dv), (0, 0) if B_hat is None else B_hat.stride()
    launch(
        finish_dy_kernel, (triton.cdiv(N, BN) + triton.cdiv(elements, BLOCK),),
        (*parts, B_hat, column, divisor, *out),
        (dv_count, count, elements, N, R, *strides),
        WITH_DV=out.dv is not None, WITH_PRODUCT=out.product is not None, WITH_SUMS=out.sums is not None,
        WITH_DOTS=out.dots is not None, WITH_COLUMN=column is not None, WITH_B=B_hat is not None,
        BN=BN, BR=BR, BLOCK=BLOCK,
    )  # fmt: skip
