"""The experts of a model on their tokens, each projection with its adapter beside the frozen
weights: what Transformers' grouped_mm_experts_forward computes with W + s·BA in the place of W.

    rows = x sorted by expert        u = up(rows)        v = gate(u)        z = down(v)
    y[t] = Σ_j w[t, j] · z of token t's choice j

Tokens are sorted once for both projections. A choice that is no expert of this process (expert
parallelism marks it by a number from `num_experts` on) stands behind all others and counts 0.
"""

from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels.autograd.routed_rows import WeightedRows
from delora_kernels.functional.grouped import run_routed


class Projection(NamedTuple):
    """One of the two linears of every expert.

    Args:
        weight: [E, N, K], any strides; or `StoredExperts`.
        bias: [E, N] or None.
        A, B: [E, r, K], [E, N, r]; both None: no adapter.
        scale: Factor of its update.
    """

    weight: Any
    bias: Tensor | None
    A: Tensor | None = None
    B: Tensor | None = None
    scale: float = 1.0

    def __call__(self, x: Tensor, offsets: Tensor, *routing: Tensor) -> Tensor:
        factors = None if self.A is None or self.B is None else (self.A, self.B, self.scale)
        return run_routed(x, self.weight, self.bias, factors, offsets, *routing)


def experts_block(
    experts: Any, up: Projection, down: Projection, x: Tensor, chosen: Tensor, weights: Tensor, by_weight: bool
) -> Tensor:
    """Run the experts.

    Args:
        experts: The module: its gate, activation and norm are called.
        up: gate_up_proj, or up_proj of experts without a gate.
        down: down_proj.
        x: [T, H].
        chosen: [T, k], ints: the experts of each token.
        weights: [T, k].
        by_weight: Whether the linears run in the weights' dtype whatever autocast says.

    Returns:
        y [T, H] in x's dtype.
    """
    E, k = up.weight.shape[0], chosen.shape[1]
    ids, order = torch.sort(chosen.reshape(-1), stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.shape[0], device=order.device))
    offsets = torch.searchsorted(ids, torch.arange(E, device=ids.device, dtype=ids.dtype), right=True)
    linear = torch.autocast(x.device.type, enabled=False) if by_weight else nullcontext()
    with linear:
        inner = up(x.to(up.weight.dtype) if by_weight else x, offsets, order // k, places.view(-1, k))
    inner = experts._apply_gate(inner) if experts.has_gate else experts.act_fn(inner)
    with linear:
        z = down(inner.to(down.weight.dtype) if by_weight else inner, offsets)
    if experts.has_post_expert_norm:
        z = experts.post_expert_norm(z)
    y: Tensor = WeightedRows.apply(z, weights, order, places)
    return y.to(x.dtype)
