"""A mixture's projection with its gating: h = x [A; G; A⁰]ᵀ, v and w from one launch, where no sum
is split.

A program holds whole sums for its tokens, the router's too (E columns more, padded to 16, in each
tile of ranks), and gates in its epilogue; the first tile writes w and the parts of the statistics.
Where the sum is split, or x has masks, or experts share one A, `times_small.py` leaves parts, and
`route.py` gates as it adds them.
"""

import triton
import triton.language as tl
from torch import Tensor

from delora_kernels.backends.dropout import mask_groups
from delora_kernels.backends.triton.device import mixed_dot
from delora_kernels.backends.triton.forms import capability
from delora_kernels.backends.triton.launch import INTERPRETED, dot_split, in_tf32, launch, precision, record, rows
from delora_kernels.backends.triton.route import route, route_totals, weights, write_sums
from delora_kernels.backends.triton.tables import cdiv, rank_tile, tiles
from delora_kernels.backends.triton.times_small import kinds_of, split, times_small_parts
from delora_kernels.op_arguments import Gating, Masks

LARGEST_EXPERTS = 16
"""Experts whose logits a program holds beside its tile of h: a dot's least side."""

LARGEST_MIXED_RANK = 64
"""Ranks that a program takes of factors wider than x: their parts need registers too."""


@triton.jit(do_not_specialize=["T"])
def project_route_kernel(
    X, S, GATES, SCALE, SHARE, H, V, W, SUMS,
    T, C, E, R, passed, stride_x, stride_sc, stride_sr, stride_h, stride_v,
    GIVEN: tl.constexpr, WITH_SHARE: tl.constexpr, K: tl.constexpr, RENORMALIZE: tl.constexpr,
    HOW: tl.constexpr, PRECISION: tl.constexpr, INTERPRETED: tl.constexpr,
    BT: tl.constexpr, BC: tl.constexpr, BR: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """One tile [BT, BR] of v = [w · s · u | rest] and of these columns of h; tile 0: the logits, w,
    f, P and z too.
    """
    t = tl.program_id(0).to(tl.int64) * BT + tl.arange(0, BT)
    q = tl.program_id(1) * BR + tl.arange(0, BR)
    e = tl.arange(0, BE)
    width = E * R
    known = q < width + passed
    at = q if GIVEN else tl.where(q < width, q, q + E)  # of h and of S
    u = tl.zeros((BT, BR), tl.float32)
    logits = tl.zeros((BT, BE), tl.float32)
    for c0 in range(0, C, BC):
        c = c0 + tl.arange(0, BC)
        x = tl.load(X + t[:, None] * stride_x + c[None, :], (t[:, None] < T) & (c[None, :] < C), 0.0)
        down = S + c[:, None].to(tl.int64) * stride_sc
        s = tl.load(down + at[None, :] * stride_sr, (c[:, None] < C) & known[None, :], 0.0)
        u = mixed_dot(x, s, u, HOW, PRECISION, INTERPRETED)
        if not GIVEN:
            g = tl.load(down + (width + e[None, :]) * stride_sr, (c[:, None] < C) & (e[None, :] < E), 0.0)
            logits = mixed_dot(x, g, logits, HOW, PRECISION, INTERPRETED)
    token, inside = t[:, None] < T, (t[:, None] < T) & (e[None, :] < E)
    owner = tl.minimum(q // R, E - 1)
    if GIVEN:
        w = tl.load(GATES + t[:, None] * E + e[None, :], inside, 0.0)
        p = w
        chosen = (w != 0) & inside
        z = tl.zeros((BT,), tl.float32)
        own = tl.load(GATES + t[:, None] * E + owner[None, :], token, 0.0)
    else:
        column = (e[None, :] < E) & (t[:, None] >= 0)
        rounded = logits.to(H.dtype.element_ty)  # as backward will see them
        p, w, chosen, lse = weights(tl.where(column, rounded.to(tl.float32), float("-inf")), e, column, K, RENORMALIZE)
        z = lse * lse
        own = tl.gather(w, tl.broadcast_to(owner[None, :], (BT, BR)), 1)
        if tl.program_id(1) == 0:
            tl.store(H + t[:, None] * stride_h + width + e[None, :], rounded, inside)
            tl.store(W + t[:, None] * E + e[None, :], w, inside)
    if tl.program_id(1) == 0:
        write_sums(SUMS, SHARE, tl.program_id(0), t, e, p, chosen, z, T, E, WITH_SHARE)
    gated = tl.where(own == 0, 0.0, own * tl.load(SCALE + owner)[None, :] * u)
    v = tl.where(q[None, :] < width, gated, u)
    tl.store(H + t[:, None] * stride_h + at[None, :], u.to(H.dtype.element_ty), token & known[None, :])
    tl.store(V + t[:, None] * stride_v + q[None, :], v.to(V.dtype.element_ty), token & known[None, :])


def project_route(
    x: Tensor, A_hat: Tensor, masks: Masks, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch for h, v and w or two, and one for the sums over tokens; x is read once for each
    mask.
    """
    experts, rank, renormalize, shared, scale, token_share = gating
    (T, C), columns, given = x.shape, A_hat.shape[0], gates is not None
    logits = 0 if given else experts
    whole = masks.seed is None and not shared and experts <= LARGEST_EXPERTS and T * C > 0
    whole = whole and (x.dtype == A_hat.dtype or columns - logits <= LARGEST_MIXED_RANK)
    kinds = kinds_of(x.dtype, A_hat.dtype, False)
    if not whole or split(T, C, x.device, x.dtype, (kinds,), columns - logits)[0] > 1:
        parts = times_small_parts(x, A_hat.t(), A_hat.dtype, mask_groups(columns, masks))
        return route(parts, A_hat.dtype, gates, top_k, gating)
    x, gates = rows(x), None if gates is None else gates.contiguous()
    BR = rank_tile("times_small", columns - logits)
    tile = tiles("times_small", BR, capability(x.device), kinds)
    h = A_hat.new_empty((T, columns))
    v = h.new_empty((T, columns - logits))
    w = scale.new_empty(0 if given else (T, experts))
    programs = cdiv(T, tile.tokens)
    sums = scale.new_empty((programs, 2 * experts + 1))
    how = dot_split(x.dtype, A_hat.dtype)
    made = record(
        project_route_kernel,
        (
            C, experts, rank, gating.passed(columns, logits),
            x.stride(0), A_hat.stride(1), A_hat.stride(0), h.stride(0), v.stride(0),
        ),
        GIVEN=given, WITH_SHARE=token_share is not None, K=0 if top_k == experts else top_k,
        RENORMALIZE=renormalize and not given,
        HOW=how, PRECISION=precision(how, in_tf32(x.dtype)), INTERPRETED=INTERPRETED,
        BT=tile.tokens, BC=tile.columns, BR=BR, BE=LARGEST_EXPERTS, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    tensors = (x, A_hat, gates, scale.contiguous(), token_share, h, v, w, sums)
    launch(made, (programs, cdiv(columns - logits, BR)), tensors, (T,))
    return h, v, w, *route_totals(sums, experts, T if token_share is None else 1)
