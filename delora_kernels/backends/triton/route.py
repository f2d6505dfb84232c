"""A mixture's gating and its gradient: one kernel each over blocks of tokens, everything between in registers.

Sums over tokens (f, P, z) are written for each block of tokens, [blocks, 2E + 1], and added up in their order by one
more launch: no atomics.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.launch import launch, rows

NUMBERS = 1024
"""What a program holds of a [T, E] tensor (E padded), at the most: it lives in registers several times over."""


@triton.jit
def _weights(logits, at, inside, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """p and w [BT, BE] of logits whose columns outside are −∞, and logsumexp [BT]; the lowest index wins ties."""
    top = tl.max(logits, 1)
    powers = tl.where(inside, tl.exp(logits - top[:, None]), 0.0)
    total = tl.sum(powers, 1)
    p = powers / total[:, None]
    chosen = inside & (at[None, :] < 0)  # none yet
    if K > 0:
        for _ in range(K):
            left = tl.where(chosen | (inside == 0), float("-inf"), logits)
            best = tl.max(left, 1)
            # NaN is equal to nothing: then the row has no choice and w is NaN all over, as p is
            first = tl.min(tl.where((left == best[:, None]) & inside & (chosen == 0), at[None, :], 1 << 20), 1)
            chosen = chosen | (at[None, :] == first[:, None])
        chosen = chosen | (p != p)
    else:
        chosen = inside | (chosen & inside)
    w = tl.where(chosen & inside, p, 0.0)
    if RENORMALIZE:
        kept = tl.where(chosen & inside, powers, 0.0)
        w = tl.where(chosen & inside, kept / tl.sum(kept, 1)[:, None], 0.0)
    return p, w, chosen & inside, top + tl.log(total)


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    H, GATES, SCALE, SHARE, V, W, SUMS,
    T, E, R, passed, stride_h, stride_v,
    GIVEN: tl.constexpr, SHARED: tl.constexpr, WITH_SHARE: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BT tokens of v = [w · s · u | rest] and of w, and their parts of the sums f, P and z."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside = (t[:, None] < T) & (e[None, :] < E)
    row = t[:, None].to(tl.int64)
    width = R if SHARED else R * E
    if GIVEN:
        w = tl.load(GATES + row * E + e[None, :], inside, 0.0)
        p = w
        chosen = (w != 0) & inside
        z = tl.zeros((BT,), tl.float32)
    else:
        logits = tl.load(H + row * stride_h + width + e[None, :], inside, 0.0).to(tl.float32)
        column = (e[None, :] < E) & (t[:, None] >= 0)
        p, w, chosen, lse = _weights(tl.where(column, logits, float("-inf")), e, column, K, RENORMALIZE)
        tl.store(W + row * E + e[None, :], w, inside)
        z = lse * lse
    counted = tl.where(t < T, 1.0, 0.0)
    if WITH_SHARE:
        counted = tl.load(SHARE + t, t < T, 0.0)
    says = counted[:, None] != 0
    out = SUMS + (2 * block.to(tl.int64) * E + block)
    tl.store(out + e, tl.sum(tl.where(chosen & says, counted[:, None], 0.0), 0), e < E)
    tl.store(out + E + e, tl.sum(tl.where(says, p * counted[:, None], 0.0), 0), e < E)
    tl.store(out + 2 * E, tl.sum(tl.where(counted != 0, z * counted, 0.0), 0))
    scale = tl.load(SCALE + e, e < E, 0.0)
    for expert in range(E):
        mine = e[None, :] == expert
        w_e = tl.sum(tl.where(mine, w, 0.0), 1)
        s_e = tl.sum(tl.where(e == expert, scale, 0.0), 0)
        first = 0 if SHARED else expert * R
        for r0 in range(0, R, BR):
            r = r0 + tl.arange(0, BR)
            within = (t[:, None] < T) & (r[None, :] < R)
            u = tl.load(H + row * stride_h + first + r[None, :], within, 0.0).to(tl.float32)
            v = tl.where(w_e[:, None] == 0, 0.0, (w_e * s_e)[:, None] * u)
            tl.store(V + row * stride_v + expert * R + r[None, :], v.to(V.dtype.element_ty), within)
    after = width if GIVEN else width + E
    for c0 in range(0, passed, BR):
        c = c0 + tl.arange(0, BR)
        within = (t[:, None] < T) & (c[None, :] < passed)
        rest = tl.load(H + row * stride_h + after + c[None, :], within, 0.0)
        tl.store(V + row * stride_v + R * E + c[None, :], rest, within)


@triton.jit(do_not_specialize=["blocks"])
def route_totals_kernel(SUMS, FRACTION, PROBABILITY, Z, blocks, E, count, BP: tl.constexpr, BC: tl.constexpr):
    """f, P [E] and z [1]: the sums of all blocks, over `count`; one program."""
    c = tl.arange(0, BC)
    total = tl.zeros((BC,), tl.float32)
    for p0 in range(0, blocks, BP):
        p = p0 + tl.arange(0, BP)
        at = SUMS + p[:, None].to(tl.int64) * (2 * E + 1) + c[None, :]
        total += tl.sum(tl.load(at, (p[:, None] < blocks) & (c[None, :] < 2 * E + 1), 0.0), 0)
    total = total / count
    tl.store(FRACTION + c, total, c < E)
    tl.store(PROBABILITY + c - E, total, (c >= E) & (c < 2 * E))
    tl.store(Z + c - 2 * E, total, c == 2 * E)


@triton.jit
def _softmax_backward(p, dp):
    return p * (dp - tl.sum(p * dp, 1)[:, None])


@triton.jit(do_not_specialize=["T"])
def route_backward_kernel(
    DV, H, W, SCALE, SHARE, DP, DZ, DH, DGATES, DS_SUM,
    T, E, R, passed, stride_dv, stride_h, stride_dh, inverse,
    GIVEN: tl.constexpr, SHARED: tl.constexpr, WITH_SHARE: tl.constexpr, RENORMALIZE: tl.constexpr,
    BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BT tokens of dh = [du | dlogits | rest] and of the gates' gradient, and their part of ds."""
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside = (t[:, None] < T) & (e[None, :] < E)
    row = t[:, None].to(tl.int64)
    width = R if SHARED else R * E
    w = tl.load(W + row * E + e[None, :], inside, 0.0)
    scale = tl.load(SCALE + e, e < E, 0.0)
    aligned = tl.zeros((BT, BE), tl.float32)
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)
        within = (t[:, None] < T) & (r[None, :] < R)
        shared_du = tl.zeros((BT, BR), tl.float32)
        for expert in range(E):
            mine = e[None, :] == expert
            w_e = tl.sum(tl.where(mine, w, 0.0), 1)
            s_e = tl.sum(tl.where(e == expert, scale, 0.0), 0)
            first = 0 if SHARED else expert * R
            u = tl.load(H + row * stride_h + first + r[None, :], within, 0.0).to(tl.float32)
            dv = tl.load(DV + row * stride_dv + expert * R + r[None, :], within, 0.0).to(tl.float32)
            aligned += tl.where(mine, tl.sum(u * dv, 1)[:, None], 0.0)
            du = tl.where(w_e[:, None] == 0, 0.0, (w_e * s_e)[:, None] * dv)
            if SHARED:
                shared_du += du
            else:
                tl.store(DH + row * stride_dh + first + r[None, :], du.to(DH.dtype.element_ty), within)
        if SHARED:
            tl.store(DH + row * stride_dh + r[None, :], shared_du.to(DH.dtype.element_ty), within)
    tl.store(DS_SUM + block.to(tl.int64) * E + e, tl.sum(tl.where(w == 0, 0.0, w * aligned), 0), e < E)
    counted = tl.where(t < T, inverse, 0.0)
    if WITH_SHARE:
        counted = tl.load(SHARE + t, t < T, 0.0)
    dP = tl.load(DP + e, e < E, 0.0)[None, :]
    dw = aligned * scale[None, :]
    if GIVEN:
        tl.store(DGATES + row * E + e[None, :], dw + dP * counted[:, None], inside)
        after = width
    else:
        logits = tl.load(H + row * stride_h + width + e[None, :], inside, 0.0).to(tl.float32)
        column = (e[None, :] < E) & (t[:, None] >= 0)
        p, _, _, lse = _weights(tl.where(column, logits, float("-inf")), e, column, 0, False)
        dw = tl.where(w == 0, 0.0, dw)
        kept = w if RENORMALIZE else p
        dz = tl.load(DZ)
        mean = (_softmax_backward(p, dP + tl.zeros_like(p)) + 2 * dz * lse[:, None] * p) * counted[:, None]
        task = tl.where(kept == 0, 0.0, _softmax_backward(kept, dw))
        dlogits = task + tl.where(counted[:, None] == 0, 0.0, mean)
        tl.store(DH + row * stride_dh + width + e[None, :], dlogits.to(DH.dtype.element_ty), inside)
        after = width + E
    for c0 in range(0, passed, BR):
        c = c0 + tl.arange(0, BR)
        within = (t[:, None] < T) & (c[None, :] < passed)
        rest = tl.load(DV + row * stride_dv + R * E + c[None, :], within, 0.0)
        tl.store(DH + row * stride_dh + after + c[None, :], rest, within)


def blocks(experts: int, rank: int) -> dict[str, int]:
    """Tile sizes: powers of two that hold E, and R or 16 of it at a time."""
    BE = triton.next_power_of_2(experts)
    return {"BT": max(1, min(32, NUMBERS // BE)), "BE": BE, "BR": min(16, triton.next_power_of_2(rank))}


def totals_blocks(experts: int) -> dict[str, int]:
    """Tile sizes of the totals: all columns, and as many rows as registers hold."""
    columns = triton.next_power_of_2(2 * experts + 1)
    return {"BP": max(1, 2048 // columns), "BC": columns}


def warps(experts: int) -> int:
    """Warps of a program: with many experts each holds less of a [T, E] tensor, so that nothing spills."""
    return 8 if experts > 32 else 4


def route(
    h: Tensor,
    gates: Tensor | None,
    scale: Tensor,
    token_share: Tensor | None,
    experts: int,
    rank: int,
    top_k: int,
    renormalize: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax, choice, gate and the tokens' statistics, from one read of h."""
    T = h.shape[0]
    h, given = rows(h), gates is not None
    passed = h.shape[1] - (rank if shared else experts * rank) - (0 if given else experts)
    v = h.new_empty((T, experts * rank + passed))
    w = scale.new_empty(0 if given else (T, experts))
    sizes = blocks(experts, rank)
    programs = max(1, triton.cdiv(T, sizes["BT"]))
    sums = scale.new_empty((programs, 2 * experts + 1))
    fraction, probability, z = (scale.new_empty(size) for size in (experts, experts, 1))
    launch(
        route_kernel, (programs,),
        (h, None if gates is None else gates.contiguous(), scale.contiguous(), token_share, v, w, sums),
        (T, experts, rank, passed, h.stride(0), v.stride(0)),
        GIVEN=given, SHARED=shared, WITH_SHARE=token_share is not None, K=0 if top_k == experts else top_k,
        RENORMALIZE=renormalize and not given, **sizes, num_warps=warps(experts),
    )  # fmt: skip
    count = float(max(1, T)) if token_share is None else 1.0
    launch(
        route_totals_kernel, (1,), (sums, fraction, probability, z), (programs, experts), (count,),
        **totals_blocks(experts),
    )  # fmt: skip
    return v, w, fraction, probability, z


def route_backward(
    dv: Tensor,
    h: Tensor,
    w: Tensor,
    scale: Tensor,
    token_share: Tensor | None,
    dP: Tensor,
    dz: Tensor,
    given: bool,
    experts: int,
    rank: int,
    renormalize: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """One read of dv and of h for every gradient."""
    T = h.shape[0]
    dv, h = rows(dv), rows(h)
    passed = dv.shape[1] - experts * rank
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dgates = w.new_empty((T, experts) if given else 0)
    sizes = blocks(experts, rank)
    programs = max(1, triton.cdiv(T, sizes["BT"]))
    dscale = scale.new_empty((programs, experts))
    launch(
        route_backward_kernel, (programs,),
        (dv, h, w.contiguous(), scale.contiguous(), token_share, dP.contiguous(), dz, dh, dgates, dscale),
        (T, experts, rank, passed, dv.stride(0), h.stride(0), dh.stride(0)), (1 / max(1, T),),
        GIVEN=given, SHARED=shared, WITH_SHARE=token_share is not None, RENORMALIZE=renormalize,
        **sizes, num_warps=warps(experts),
    )  # fmt: skip
    return dh, dgates, dscale.sum(0)
