"""A mixture's gating in Triton: v, w and the sums over tokens, from the parts of h = x Âᵀ that
projecting left.

The kernel that adds the parts gates what it has added: h is written, not read again. Everything
between is in registers. Sums over tokens (f, P, z) are written for each block of tokens, [blocks,
2E + 1], and added up in their order by one more launch: no atomics. `project_route.py` uses the
same gating where nothing has to be added.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.triton.add_parts import total
from delora_kernels.backends.triton.launch import launch, record
from delora_kernels.backends.triton.tables import REGISTERS, cdiv, power_of_2
from delora_kernels.op_arguments import Gating

NUMBERS = 1024
"""What a program holds of a [T, E] tensor (E padded), at the most: it lives in registers several
times over.
"""


@triton.jit
def weights(logits, at, inside, K: tl.constexpr, RENORMALIZE: tl.constexpr):
    """p and w [BT, BE] of logits whose columns outside are −∞, and logsumexp [BT]; the lowest index
    wins ties.
    """
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


@triton.jit
def write_sums(SUMS, SHARE, block, t, e, p, chosen, z, T, E, WITH_SHARE: tl.constexpr):
    """Write a block's parts of f, P and z; a token whose share is 0 has no say, even if NaN."""
    counted = tl.where(t < T, 1.0, 0.0)
    if WITH_SHARE:
        counted = tl.load(SHARE + t, t < T, 0.0)
    says = counted[:, None] != 0
    out = SUMS + (2 * block.to(tl.int64) * E + block)
    tl.store(out + e, tl.sum(tl.where(chosen & says, counted[:, None], 0.0), 0), e < E)
    tl.store(out + E + e, tl.sum(tl.where(says, p * counted[:, None], 0.0), 0), e < E)
    tl.store(out + 2 * E, tl.sum(tl.where(counted != 0, z * counted, 0.0), 0))


@triton.jit(do_not_specialize=["T", "parts"])
def route_kernel(
    PARTS, GATES, SCALE, SHARE, H, V, W, SUMS,
    T, parts, E, R, passed, stride_p, stride_v,
    ADDS: tl.constexpr, GIVEN: tl.constexpr, SHARED: tl.constexpr, WITH_SHARE: tl.constexpr, K: tl.constexpr,
    RENORMALIZE: tl.constexpr, BT: tl.constexpr, BE: tl.constexpr, BR: tl.constexpr,
):  # fmt: skip
    """BT tokens of h = Σ PARTS, of v = [w · s · u | rest] and of w, and their parts of the sums f,
    P and z.
    """
    block = tl.program_id(0)
    t = block * BT + tl.arange(0, BT)
    e = tl.arange(0, BE)
    inside = (t[:, None] < T) & (e[None, :] < E)
    row = t[:, None].to(tl.int64)
    elements = tl.cast(T, tl.int64) * stride_p
    width = R if SHARED else R * E
    if GIVEN:
        w = tl.load(GATES + row * E + e[None, :], inside, 0.0)
        p = w
        chosen = (w != 0) & inside
        z = tl.zeros((BT,), tl.float32)
        after = width
    else:
        of_logits = row * stride_p + width + e[None, :]
        rounded = total(PARTS, of_logits, parts, elements, inside).to(V.dtype.element_ty)  # as backward will see them
        if ADDS:
            tl.store(H + of_logits, rounded, inside)
        column = (e[None, :] < E) & (t[:, None] >= 0)
        logits = tl.where(column, rounded.to(tl.float32), float("-inf"))
        p, w, chosen, lse = weights(logits, e, column, K, RENORMALIZE)
        tl.store(W + row * E + e[None, :], w, inside)
        z = lse * lse
        after = width + E
    write_sums(SUMS, SHARE, block, t, e, p, chosen, z, T, E, WITH_SHARE)
    gate = w * tl.load(SCALE + e, e < E, 0.0)[None, :]
    token, expert = row[:, :, None], e[None, :, None]
    between = 0 if SHARED else R  # two experts' first columns of u
    for r0 in range(0, R, BR):
        r = r0 + tl.arange(0, BR)[None, None, :]
        within = inside[:, :, None] & (r < R)
        of_u = token * stride_p + expert * between + r
        u = total(PARTS, of_u, parts, elements, within)
        if ADDS:
            tl.store(H + of_u, u.to(H.dtype.element_ty), within & ((expert == 0) | (between > 0)))
        v = tl.where(w[:, :, None] == 0, 0.0, gate[:, :, None] * u)
        tl.store(V + token * stride_v + expert * R + r, v.to(V.dtype.element_ty), within)
    for c0 in range(0, passed, BE):
        c = c0 + e[None, :]
        passes = (t[:, None] < T) & (c < passed)
        of_rest = row * stride_p + after + c
        rest = total(PARTS, of_rest, parts, elements, passes).to(V.dtype.element_ty)
        if ADDS:
            tl.store(H + of_rest, rest, passes)
        tl.store(V + row * stride_v + R * E + c, rest, passes)


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


def blocks(experts: int, rank: int) -> dict[str, int]:
    """Tile sizes: powers of two that hold E, and R or as much of it at a time as registers take."""
    BE = power_of_2(experts)
    BT = max(1, min(32, NUMBERS // BE))
    return {"BT": BT, "BE": BE, "BR": min(power_of_2(rank), max(4, 4 * NUMBERS // (BT * BE)))}


def totals_blocks(experts: int) -> dict[str, int]:
    """Tile sizes of the totals: all columns, and as many rows as registers hold."""
    columns = power_of_2(2 * experts + 1)
    return {"BP": max(1, 2048 // columns), "BC": columns}


def warps(experts: int) -> int:
    """Warps of a program: with many experts each holds less of a [T, E] tensor, so that nothing
    spills.
    """
    return 8 if experts > 32 else 4


def route(
    parts: Tensor, dtype: torch.dtype, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the op `project_route` from one read of `parts`, which `times_small_parts` left of h;
    h and v in `dtype`.
    """
    experts, rank, renormalize, shared, scale, token_share = gating
    (count, T, columns), given = parts.shape, gates is not None
    passed = gating.passed(columns, 0 if given else experts)
    adds = count > 1 or parts.dtype != dtype
    h = parts.new_empty((T, columns), dtype=dtype) if adds else parts[0]
    v = h.new_empty((T, experts * rank + passed))
    w = scale.new_empty(0 if given else (T, experts))
    sizes = blocks(experts, rank)
    programs = max(1, cdiv(T, sizes["BT"]))
    sums = scale.new_empty((programs, 2 * experts + 1))
    made = record(
        route_kernel, (experts, rank, passed, columns, v.stride(0)),
        ADDS=adds, GIVEN=given, SHARED=shared, WITH_SHARE=token_share is not None,
        K=0 if top_k == experts else top_k, RENORMALIZE=renormalize and not given,
        **sizes, num_warps=warps(experts), maxnreg=REGISTERS,
    )  # fmt: skip
    tensors = (
        parts, None if gates is None else gates.contiguous(), scale.contiguous(), token_share,
        h if adds else None, v, w, sums,
    )  # fmt: skip
    launch(made, (programs,), tensors, (T, count))
    return h, v, w, *route_totals(sums, experts, T if token_share is None else 1)


def route_totals(sums: Tensor, experts: int, tokens: int) -> tuple[Tensor, Tensor, Tensor]:
    """f [E], P [E] and z [1] of the blocks' sums [blocks, 2E + 1], over the number of tokens."""
    fraction, probability, z = (sums.new_empty(size) for size in (experts, experts, 1))
    made = record(route_totals_kernel, (experts,), **totals_blocks(experts))
    launch(made, (1,), (sums, fraction, probability, z), (sums.shape[0],), (float(max(1, tokens)),))
    return fraction, probability, z
