"""The gradient of a mixture's gating, in the launch that adds up what the reads of dy left in
parts.

dv is added where it is needed, in registers: dh, the gates' and the scales' gradients come of it,
dv itself is never written. Other programs of the same launch add dB̂ and the bias's gradient.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.library_gemm import sum_of
from delora_kernels.backends.triton.add_parts import BLOCK, add, total
from delora_kernels.backends.triton.launch import launch, record, rows
from delora_kernels.backends.triton.route import blocks, warps, weights
from delora_kernels.backends.triton.stages import STAGES
from delora_kernels.backends.triton.tables import REGISTERS, cdiv
from delora_kernels.op_arguments import Gated, Gating


@triton.jit
def _softmax_backward(p, dp):
    dp -= tl.sum(p * dp, 1)[:, None]  # twice, as in backends/eager/route.py
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit(do_not_specialize=["T", "dv_parts", "parts"])
def route_backward_kernel(
    DV_PARTS, PRODUCT_PARTS, SUM_PARTS, H, W, SCALE, SHARE, DP, DZ, DB, SUMS, DH, DGATES, DS_SUM,
    T, dv_parts, parts, E, R, passed, product_elements, N, stride_dv, stride_h, stride_dh, inverse,
    ADDS_PRODUCT: tl.constexpr, ADDS_SUMS: tl.constexpr, WITH_DS: tl.constexpr, GIVEN: tl.constexpr,
    SHARED: tl.constexpr, WITH_SHARE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Let the first programs make BT tokens of dh and of the gates' gradient, and their part of ds;
    then BLOCK elements each of
    dB̂, of Σ_t dy."""
    block = tl.program_id(0)
    gating = (T + BT - 1) // BT
    if block < gating:
        t = block * BT + tl.arange(0, BT)
        e = tl.arange(0, BE)
        inside = (t[:, None] < T) & (e[None, :] < E)
        row = t[:, None].to(tl.int64)
        dv_elements = tl.cast(T, tl.int64) * stride_dv
        width = R if SHARED else R * E
        w = tl.load(W + row * E + e[None, :], inside, 0.0)
        scale = tl.load(SCALE + e, e < E, 0.0)
        gate = w * scale[None, :]
        between = 0 if SHARED else R  # two experts' first columns of u
        aligned = tl.zeros((BT, BE), tl.float32)
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            within = inside[:, :, None] & (r[None, None, :] < R)
            own = e[None, :, None] * between + r[None, None, :]
            u = tl.load(H + row[:, :, None] * stride_h + own, within, 0.0).to(tl.float32)
            of_dv = row[:, :, None] * stride_dv + e[None, :, None] * R + r[None, None, :]
            dv = total(DV_PARTS, of_dv, dv_parts, dv_elements, within)
            aligned += tl.sum(u * dv, 2)
            du = tl.where(w[:, :, None] == 0, 0.0, gate[:, :, None] * dv)
            if SHARED:
                of_du = row * stride_dh + r[None, :]
                tl.store(DH + of_du, tl.sum(du, 1).to(DH.dtype.element_ty), (t[:, None] < T) & (r[None, :] < R))
            else:
                tl.store(DH + row[:, :, None] * stride_dh + own, du.to(DH.dtype.element_ty), within)
        if WITH_DS:
            tl.store(DS_SUM + block.to(tl.int64) * E + e, tl.sum(tl.where(w == 0, 0.0, w * aligned), 0), e < E)
        counted = tl.where(t < T, inverse, 0.0)
        if WITH_SHARE:
            counted = tl.load(SHARE + t, t < T, 0.0)
        dP = tl.load(DP + e, e < E, 0.0)[None, :]
        dw = aligned * scale[None, :]
        after = width if GIVEN else width + E
        if GIVEN:
            tl.store(DGATES + row * E + e[None, :], dw + dP * counted[:, None], inside)
        else:
            logits = tl.load(H + row * stride_h + width + e[None, :], inside, 0.0).to(tl.float32)
            column = (e[None, :] < E) & (t[:, None] >= 0)
            p, _, _, lse = weights(tl.where(column, logits, float("-inf")), e, column, 0, False)
            dw = tl.where(w == 0, 0.0, dw)
            kept = w if RENORMALIZE else p
            mean = (_softmax_backward(p, dP + tl.zeros_like(p)) + 2 * tl.load(DZ) * lse[:, None] * p) * counted[:, None]
            task = tl.where(kept == 0, 0.0, _softmax_backward(kept, dw))
            dlogits = task + tl.where(counted[:, None] == 0, 0.0, mean)
            tl.store(DH + row * stride_dh + width + e[None, :], dlogits.to(DH.dtype.element_ty), inside)
        for c0 in range(0, passed, BE):
            c = c0 + e[None, :]
            passes = (t[:, None] < T) & (c < passed)
            rest = total(DV_PARTS, row * stride_dv + R * E + c, dv_parts, dv_elements, passes)
            tl.store(DH + row * stride_dh + after + c, rest.to(DH.dtype.element_ty), passes)
    else:
        block -= gating
        products = 0
        if ADDS_PRODUCT:
            products = (product_elements + BLOCK - 1) // BLOCK
            if block < products:
                i = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
                add(PRODUCT_PARTS, DB, i, parts, product_elements)
        if ADDS_SUMS:
            if block >= products:
                add(SUM_PARTS, SUMS, (block - products).to(tl.int64) * BLOCK + tl.arange(0, BLOCK), parts, N)


def expand_route_backward(
    dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, gated: Gated, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One read of dy at ranks up to 32, above one for dv and one for the sums; then one launch."""
    h, w, given, dP, dz, need_scale = gated
    experts, rank, renormalize, shared, scale, token_share = gating
    dv, product, sums, _ = STAGES.read_for_gating(dy, v, B_hat, need_bias)
    assert dv is not None
    (T, N), h = dy.shape, rows(h)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dgates = w.new_empty((T, experts) if given else 0)
    dB_hat, dy_sum = (sum_of(each, w) for each in (product, sums))
    adds_product, adds_sums = (each is not None and len(each) > 1 for each in (product, sums))
    sizes = blocks(experts, rank)
    gaters = cdiv(T, sizes["BT"])
    dscale = scale.new_empty((gaters, experts)) if need_scale else None
    programs = gaters + cdiv(dB_hat.numel(), BLOCK) * adds_product + cdiv(N, BLOCK) * adds_sums
    parts = len(product) if product is not None else 0 if sums is None else len(sums)
    if programs:
        made = record(
            route_backward_kernel,
            (
                experts, rank, dv.shape[2] - experts * rank,
                dB_hat.numel(), N, dv.shape[2], h.stride(0), dh.stride(0),
            ),
            ADDS_PRODUCT=adds_product, ADDS_SUMS=adds_sums, WITH_DS=need_scale, GIVEN=given, SHARED=shared,
            WITH_SHARE=token_share is not None, RENORMALIZE=renormalize, **sizes, BLOCK=BLOCK,
            num_warps=warps(experts), maxnreg=REGISTERS,
        )  # fmt: skip
        tensors = (
            dv, product, sums, h, w.contiguous(), scale.contiguous(), token_share, dP.contiguous(), dz,
            dB_hat, dy_sum, dh, dgates, dscale,
        )  # fmt: skip
        launch(made, (programs,), tensors, (T, dv.shape[0], parts), (1 / max(1, T),))
    return dh, dB_hat, dy_sum, dgates, scale.new_empty(0) if dscale is None else dscale.sum(0)
