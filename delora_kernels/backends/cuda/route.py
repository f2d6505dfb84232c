"""A mixture's gating and its gradient: one launch each; sums over tokens come in parts and are added in their order."""

import torch
from torch import Tensor

from delora_kernels.backends.cuda.kernels import add_parts
from delora_kernels.backends.cuda.launch import launch, library, rows
from delora_kernels.backends.cuda.stages import expand_backward, project
from delora_kernels.backends.two_stages import expand_then_route_backward, project_then_route


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
    T, given = h.shape[0], gates is not None
    passed = h.shape[1] - (rank if shared else experts * rank) - (0 if given else experts)
    v = h.new_empty((T, experts * rank + passed))
    w = scale.new_empty(0 if given else (T, experts))
    if T == 0:
        return v, w, scale.new_zeros(experts), scale.new_zeros(experts), scale.new_zeros(1)
    blocks = _blocks(T, experts)
    f, P, z = (scale.new_empty((blocks, columns)) for columns in (experts, experts, 1))
    launch(
        "route", rows(h), None if gates is None else gates.contiguous(), scale.contiguous(), _vector(token_share), v,
        None if given else w, f, P, z, T, experts, rank, passed, top_k, renormalize, shared,
    )  # fmt: skip
    n = T if token_share is None else 1
    f, P, z = (add_parts(parts, torch.float32) / n for parts in (f, P, z))
    return v, w, f, P, z


def route_backward(
    dv: Tensor,
    h: Tensor,
    w: Tensor,
    scale: Tensor,
    token_share: Tensor | None,
    dP: Tensor,
    dz: Tensor,
    need_scale: bool,
    given: bool,
    experts: int,
    rank: int,
    renormalize: bool,
    shared: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """dh, d gates, ds, from one read of dv and of h."""
    T, passed = h.shape[0], dv.shape[1] - experts * rank
    dh = torch.empty_like(h, memory_format=torch.contiguous_format)
    dgates = w.new_empty((T, experts) if given else 0)
    if T == 0:
        return dh, dgates, scale.new_zeros(experts if need_scale else 0)
    dscale = scale.new_empty((_blocks(T, experts), experts))
    launch(
        "route_backward", rows(dv), rows(h), w.contiguous(), scale.contiguous(), _vector(token_share), dP.contiguous(),
        dz, dh, dgates if given else None, dscale, T, experts, rank, passed, given, renormalize, shared,
    )  # fmt: skip
    return dh, dgates, add_parts(dscale, torch.float32) if need_scale else scale.new_empty(0)


def _blocks(T: int, experts: int) -> int:
    return -(-T // library().dk_route_tokens(experts))


def _vector(token_share: Tensor | None) -> Tensor | None:
    return None if token_share is None else token_share.contiguous()


project_route = project_then_route(project, route)
expand_route_backward = expand_then_route_backward(expand_backward, route_backward)
