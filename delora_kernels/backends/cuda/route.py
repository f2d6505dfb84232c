"""A mixture's projection with its gating, and their gradient: h, v and w, then dh and dB̂.

Where the sum over K is not split and one block has all columns of h, the kernel that projects gates
too; else `route` gates as it adds the parts. Backward, `route_backward` adds the parts of dv, which
is never written, and of dB̂. Sums over tokens come in parts, which one more launch adds in their
order.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.backends.cuda.kernels import splits_of_times_small, times_small_parts
from delora_kernels.backends.cuda.launch import DTYPES, TILE, launch, library, rows
from delora_kernels.backends.cuda.stages import STAGES
from delora_kernels.backends.dropout import mask_arguments, mask_groups
from delora_kernels.backends.library_gemm import DyParts, sum_of
from delora_kernels.op_arguments import Gated, Gating, Masks

LARGEST_COLUMNS = 64
"""Of h, that a block of `project_route` has whole."""

LARGEST_EXPERTS = 32
"""Whose weights it has room for."""


def project_route(
    x: Tensor, A_hat: Tensor, masks: Masks, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One launch for h, v and w or two, and one for the sums over tokens; x is read once for each
    mask.
    """
    (T, C), columns, small = x.shape, A_hat.shape[0], A_hat.t()
    groups = mask_groups(columns, masks)
    whole = len(groups) == 1 and columns <= LARGEST_COLUMNS and gating.experts <= LARGEST_EXPERTS and T * C > 0
    if not whole or splits_of_times_small(T, C, [columns]) > 1:
        return route(times_small_parts(x, small, A_hat.dtype, groups), A_hat.dtype, gates, top_k, gating)
    h, mask = A_hat.new_empty((T, columns)), mask_arguments(groups[0])
    return h, *_gated("project_route", (rows(x), small, C), mask, TILE, h, gates, top_k, gating)


def route(
    parts: Tensor, dtype: torch.dtype, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Return the op `project_route` from `parts`, which `times_small_parts` left of h; h and v in
    `dtype`.
    """
    adds, tokens = len(parts) > 1, library().dk_route_tokens()
    h = parts.new_empty(parts.shape[1:], dtype=dtype) if adds else parts[0]
    return h, *_gated("route", (parts if adds else None, len(parts)), (), tokens, h, gates, top_k, gating)


def _gated(
    kernel: str,
    before: tuple[Any, ...],
    after: tuple[Any, ...],
    tokens: int,
    h: Tensor,
    gates: Tensor | None,
    top_k: int,
    gating: Gating,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """v, w, f, P and z by a kernel that has `tokens` in a block, and arguments before and after
    those of gating.
    """
    experts, rank, renormalize, shared, scale, token_share = gating
    (T, columns), given = h.shape, gates is not None
    passed = gating.passed(columns, 0 if given else experts)
    v = h.new_empty((T, experts * rank + passed))
    w = scale.new_empty(0 if given else (T, experts))
    sums = scale.new_empty((-(-T // tokens), 2 * experts + 1))
    launch(
        kernel, *before, h, _contiguous(gates), scale.contiguous(), _contiguous(token_share), v,
        None if given else w, sums, T, experts, rank, passed, top_k, renormalize, shared, *after,
    )  # fmt: skip
    f, P, z = (scale.new_empty(size) for size in (experts, experts, 1))
    launch("route_totals", sums, len(sums), experts, float(max(1, T)) if token_share is None else 1.0, f, P, z)
    return v, w, f, P, z


def expand_route_backward(
    dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, gated: Gated, gating: Gating
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """One read of dy at ranks up to 32, above one for dv and one for the sums; then one launch,
    with ds two.
    """
    return route_backward(STAGES.read_for_gating(dy, v, B_hat, need_bias), gated, gating)


def route_backward(read: DyParts, gated: Gated, gating: Gating) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dh, dB̂, Σ_t dy, d gates and ds of what reads of dy left.

    Args:
        read: dv [Q, T, E r + passed] in float32, or [1, T, E r + passed] in any dtype; dyᵀ v, Σ_t
            dy; no dots.
        gated, gating: As in the op `expand_route_backward`.
    """
    h, w, given, dP, dz, need_scale = gated
    experts, rank, renormalize, shared, scale, token_share = gating
    dv, product, sums, _ = read
    assert dv is not None
    T, h = h.shape[0], rows(h)
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dgates = w.new_empty((T, experts) if given else 0)
    dscale = scale.new_empty((-(-T // library().dk_route_tokens()), experts)) if need_scale else None
    dB_hat, dy_sum = (sum_of(parts, w) for parts in (product, sums))
    product, sums = (None if parts is None or len(parts) == 1 else parts for parts in (product, sums))
    split = product if product is not None else sums
    parts, N = (0, 0) if split is None else split.shape[:2]
    launch(
        "route_backward", dv, len(dv), DTYPES[dv.dtype], h, w.contiguous(), scale.contiguous(),
        _contiguous(token_share), dP.contiguous(), dz, dh, dgates if given else None, dscale,
        T, experts, rank, dv.shape[2] - experts * rank, given, renormalize, shared,
        product, sums, parts, dB_hat, dy_sum, N,
    )  # fmt: skip
    ds = scale.new_empty(experts if need_scale else 0)
    if dscale is not None:
        launch("route_totals", dscale, len(dscale), experts, 1.0, ds, None, None)
    return dh, dB_hat, dy_sum, dgates, ds


def _contiguous(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.contiguous()
