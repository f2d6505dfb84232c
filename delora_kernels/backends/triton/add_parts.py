"""Partial sums added in a fixed order, so that results repeat bit for bit: what follows a split
reduction, in a launch.

`add_parts` adds the parts of any tensor. `finish_dy` adds all that the reads of dy left in parts,
and makes of it what the op `expand_backward` promises: dv in its dtype, dB̂ with DoRA's c, dm
divided, the bias's gradient.
"""

from math import gcd

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.library_gemm import DyParts
from delora_kernels.backends.triton.device import in_units
from delora_kernels.backends.triton.launch import Record, launch, planned, record
from delora_kernels.backends.triton.tables import MULTIPROCESSORS, cdiv, power_of_2

BLOCK = 1024
"""Elements that a program adds up."""
MANY = 64, 64
"""Parts that are loaded together, and elements, where there are more parts than FEW, of so few
elements that BLOCK of each would keep few multiprocessors busy.
"""
FEW = 8


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
def add_parts_kernel(PARTS, OUT, parts, M, AT_ONCE: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK elements of OUT [M] = Σ_p PARTS[p], of which AT_ONCE are loaded together."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    if AT_ONCE == 1:
        add(PARTS, OUT, i, parts, M)
    else:
        p = tl.arange(0, AT_ONCE).to(tl.int64)
        sums = tl.zeros((AT_ONCE, BLOCK), tl.float32)
        for _ in range(0, parts, AT_ONCE):
            sums += tl.load(PARTS + p[:, None] * M + i[None, :], (p[:, None] < parts) & (i[None, :] < M), 0.0)
            p += AT_ONCE
        tl.store(OUT + i, tl.sum(sums, 0).to(OUT.dtype.element_ty), i < M)


@planned
def _adding(many: bool) -> Record:
    at_once, block = MANY if many else (1, BLOCK)
    made: Record = record(add_parts_kernel, AT_ONCE=at_once, BLOCK=block)
    return made


def add_parts(parts: Tensor, dtype: torch.dtype) -> Tensor:
    """Σ_p parts[p] in `dtype`; parts [P, ...] float32, contiguous. A single float32 part is
    returned as it is.
    """
    count, *shape = parts.shape
    if count == 1:
        return parts.squeeze(0).to(dtype)
    out = parts.new_empty(shape, dtype=dtype)
    M = out.numel()
    if M:
        many = count > FEW and M <= MULTIPROCESSORS * BLOCK
        launch(_adding(many), (-(-M // (MANY[1] if many else BLOCK)),), (parts, out), (count, M))
    return out


@triton.jit(do_not_specialize=["elements", "dv_parts", "parts"])
def finish_dy_kernel(
    DV_PARTS, PRODUCT_PARTS, SUM_PARTS, DOT_PARTS, B, COLUMN, DIVISOR, DV, DB, SUMS, DM,
    dv_parts, parts, elements, N, R, stride_bn, stride_br,
    WITH_DV: tl.constexpr, WITH_PRODUCT: tl.constexpr, WITH_SUMS: tl.constexpr, WITH_DOTS: tl.constexpr,
    WITH_COLUMN: tl.constexpr, WITH_B: tl.constexpr,
    BN: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr, AT_ONCE: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Programs up to N / BN: BN rows of dB̂ [N, R], Σ_t dy and dm; those after: BLOCK elements of
    dv, of which AT_ONCE parts are loaded together.
    """
    elements = in_units(elements, UNIT)
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
            sums = tl.zeros((BLOCK,), tl.float32)
            for p0 in range(0, dv_parts, AT_ONCE):
                p = p0 + tl.arange(0, AT_ONCE).to(tl.int64)
                inside = (p[:, None] < dv_parts) & (i[None, :] < elements)
                sums += tl.sum(tl.load(DV_PARTS + p[:, None] * elements + i[None, :], inside, 0.0), 0)
            tl.store(DV + i, sums.to(DV.dtype.element_ty), i < elements)


@planned
def _plan(N: int, integers: tuple[int, ...], *present: bool) -> tuple[Record, int]:
    """Return the record of a launch and its programs for all but dv; `integers` as the kernel takes
    them, from N on.
    """
    R = integers[1]
    BR = max(16, power_of_2(max(1, R)))
    names = ("WITH_DV", "WITH_PRODUCT", "WITH_SUMS", "WITH_DOTS", "WITH_COLUMN", "WITH_B")
    BN = BLOCK // BR
    made = record(
        finish_dy_kernel, integers, **dict(zip(names, present, strict=True)),
        BN=BN, BR=BR, BLOCK=BLOCK, AT_ONCE=FEW, UNIT=gcd(16, R) if R else 1,
    )  # fmt: skip
    return made, cdiv(N, BN)


def finish_dy(
    parts: DyParts, out: DyParts, column: Tensor | None, B_hat: Tensor | None, divisor: Tensor | None
) -> None:
    """Write to `out` what `Stages.finished` promises, in one launch."""
    divisor = None if divisor is None else divisor.contiguous()
    dv, product, sums, dots = parts
    first = next((found for found in (product, sums, dots) if found is not None), None)
    count, N = (0, 0) if first is None else first.shape[:2]
    elements, dv_count = (0, 0) if dv is None or out.dv is None else (out.dv.numel(), dv.shape[0])
    integers = (N, 0 if product is None else product.shape[2], *((0, 0) if B_hat is None else B_hat.stride()))
    present = (found is not None for found in (*out, column, B_hat))
    made, programs = _plan(N, integers, *present)
    tensors = (dv, product, sums, dots, B_hat, column, divisor, *out)
    launch(made, (programs - (-elements // BLOCK),), tensors, (dv_count, count, elements))
