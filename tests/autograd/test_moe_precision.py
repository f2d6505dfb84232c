"""A mixture's rounding in float32: never more than the naive formula's in the same dtype, on the
same GEMMs.

Which order a library GEMM sums in depends on its shape, so the naive formula here puts the same
factors side by side, and adds its share of dx onto dy W as addmm does; what is left to compare is
the gating and its gradient.
"""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import functional, ops, reference
from delora_kernels.op_arguments import Gated, Gating, Masks

K, N, r, E, TOP_K = 64, 8, 8, 4, 2
SEEDS = 150
UNIT = 2.0**-24
"""Of rounding to float32."""

Tensors = dict[str, Tensor]


class Projected(torch.autograd.Function):
    """x rowsᵀ, whose gradient of x is all of it: dy W + dh rows in one addmm."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, rows: Tensor, W: Tensor, dy: Tensor) -> Tensor:
        ctx.save_for_backward(x, rows, W, dy)
        return x @ rows.T

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> tuple[Tensor | None, ...]:
        x, rows, W, dy = ctx.saved_tensors
        return torch.addmm(dy @ W, dh, rows), dh.T @ x, None, None


def naive(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, router: Tensor | None, gates: Tensor | None, **o: Tensor
) -> Tensor:
    """y = x Wᵀ + Σ_e w_e s_e (x A_eᵀ) B_eᵀ in plain autograd: softmax, the largest, their sum, one
    product each.
    """
    rows = A.flatten(0, 1) if router is None else torch.cat([A.flatten(0, 1), router])
    h = Projected.apply(x, rows, W, o.pop("dy"))
    w = gates
    if w is None:
        p = h[:, E * r :].softmax(1)
        best, chosen = p.topk(TOP_K, dim=1)
        w = torch.zeros_like(p).scatter(1, chosen, best / best.sum(1, keepdim=True))
    v = (w * o["scale"]).unsqueeze(2) * h[:, : E * r].unflatten(1, (E, r))
    return x.detach() @ W.T + v.flatten(1) @ B.transpose(0, 1).flatten(1).T


def ours(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, router: Tensor | None, gates: Tensor | None, **o: Tensor
) -> Tensor:
    top_k = None if router is None else TOP_K
    return functional.moe_lora_linear(x, W, A, B, router, gates=gates, top_k=top_k, **o)[0]


def exact(
    x: Tensor, W: Tensor, A: Tensor, B: Tensor, router: Tensor | None, gates: Tensor | None, **o: Tensor
) -> Tensor:
    top_k = None if router is None else TOP_K
    return reference.moe_lora_linear(x, W, A, B, router, gates=gates, top_k=top_k, **o)[0]


def drawn(seed: int, T: int, routed: bool) -> tuple[Tensors, Tensor]:
    """Unit normal arguments, a router of 0.3, and dy; float32 numbers."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    made = {"x": normal(T, K), "W": normal(N, K), "A": normal(E, r, K), "B": normal(E, N, r), "scale": normal(E)}
    made |= {"router": 0.3 * normal(E, K)} if routed else {"gates": normal(T, E)}
    return made, normal(T, N)


def gradients(f: Callable[..., Tensor], made: Tensors, dy: Tensor, dtype: torch.dtype) -> Tensors:
    leaves = {name: value.to(dtype, copy=True).requires_grad_(name != "W") for name, value in made.items()}
    given = {"dy": dy.to(dtype)} if f is naive else {}
    y = f(**{"router": None, "gates": None} | leaves | given)
    y.backward(dy.to(dtype))
    grads = {name: leaf.grad for name, leaf in leaves.items() if leaf.grad is not None}
    return {name: grad.double() for name, grad in (grads | {"y": y.detach()}).items()}


@pytest.mark.parametrize(("T", "routed"), [(1, True), (7, True), (1, False)])
def test_gradients_are_as_exact_as_the_naive_formulas(T: int, routed: bool, seed: int) -> None:
    """The geometric mean of the ratio of errors over seeds, three standard errors of it allowed."""
    ratios: dict[str, list[float]] = {}
    for s in range(seed, seed + SEEDS):
        made, dy = drawn(s, T, routed)
        oracle, mine, theirs = (
            gradients(f, made, dy, dtype)
            for f, dtype in ((exact, torch.float64), (ours, torch.float32), (naive, torch.float32))
        )
        for name, value in oracle.items():
            floor = UNIT / 100 * float(value.norm())  # of which a lucky result may be right by chance
            errors = (max(floor, float((found[name] - value).norm())) for found in (mine, theirs))
            ratios.setdefault(name, []).append(math.log(next(errors) / next(errors)))
        if routed:
            assert_within_worst_case(made, dy, oracle["router"], mine["router"])
    assert set(ratios) == {"x", "A", "B", "scale", "y", "router" if routed else "gates"}
    for name, logs in ratios.items():
        found = torch.tensor(logs, dtype=torch.float64)
        mean, error = float(found.mean()), float(found.std()) / math.sqrt(SEEDS)
        assert mean <= math.log(1.02) + 3 * error, f"{name}: {math.exp(mean):.3f} times the naive formula's error"


def assert_within_worst_case(made: Tensors, dy: Tensor, oracle: Tensor, found: Tensor) -> None:
    """What rounding can do to dlogits_e = w_e Σ_j w_j (dw_e − dw_j) at worst, and to its product
    with x.

    dw_e is a product of four factors summed over K, r and N; a logit that is off by δ changes w by
    2 δ of itself, and what is made of w twice that.
    """
    wide = {name: value.double().abs() for name, value in made.items()}
    size = wide["scale"] * torch.einsum("tn,enr,erk,tk->te", dy.double().abs(), wide["B"], wide["A"], wide["x"])
    logits = made["x"].double() @ made["router"].double().T
    best, chosen = logits.softmax(1).topk(TOP_K, dim=1)
    w = torch.zeros_like(logits).scatter(1, chosen, best / best.sum(1, keepdim=True))
    of_logits = K * (wide["x"] @ wide["router"].T).amax(1, keepdim=True)
    steps = K + r + N + 2 * E + 10 + 4 * of_logits
    worst = UNIT * (steps * w * (size + (w * size).sum(1, keepdim=True))).T @ wide["x"]
    worst = worst + UNIT * len(dy) * oracle.abs().amax()  # the sum over tokens
    assert bool(((found - oracle).abs() <= worst).all())


@pytest.mark.parametrize("renormalize", [True, False])
def test_equal_experts_leave_the_router_alone(renormalize: bool, seed: int) -> None:
    """Where every expert would help as much, no logit has a gradient: what is left is rounding of
    rounding.
    """
    T, g = 64, torch.Generator().manual_seed(seed)
    u, logits, dv = (torch.randn(T, n, generator=g) for n in (r, E, r))
    h = torch.cat([u.repeat(1, E), logits], dim=1)
    ones, none = torch.ones(E), torch.zeros(E)
    gating = Gating(E, r, renormalize, False, ones)
    w = ops.project_route(h, torch.eye(h.shape[1]), Masks(), None, E, gating, "eager")[2]
    gated = Gated(h, w, False, none, torch.zeros(1), False)
    dh = ops.expand_route_backward(dv.repeat(1, E), None, torch.eye(E * r), False, gated, gating, "eager")[0]
    size = (u * dv).sum(1).abs().clamp(min=UNIT).unsqueeze(1)
    assert bool((dh[:, E * r :].abs() <= ((E + 2) * UNIT) ** 2 * 4 * size).all())
