"""Random mixtures of experts whose routers are sure of themselves: no rounding changes which expert
is chosen.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.lora import DROPOUT_P
from delora_kernels.testing.methods.method import Method

EXPERTS = 4
TOP_K = 2


def experts_of(draw: Draw) -> int:
    """E: no more than a router on K features can tell apart at will."""
    return min(EXPERTS, max(1, draw.K))


def sure_logits(draw: Draw, E: int) -> Tensor:
    """[T, E], each token's in an order of its own and about 1.2 apart."""
    order = draw.normal(draw.T, E).argsort(1).argsort(1)
    return 1.2 * (order - (E - 1) / 2) + 0.1 * draw.normal(draw.T, E)


def experts(draw: Draw) -> dict[str, Any]:
    """Return A [E, r, K] and B [E, N, r], as large as a plain adapter's, and a scale that is
    not 1.
    """
    E = experts_of(draw)
    A, B = draw.normal(E, draw.r, draw.K) / draw.K**0.5, draw.normal(E, draw.N, draw.r) / draw.K**0.5
    return {"A": A, "B": B, "scale": 1.25}


def routed(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """With a dense router: G has orthonormal rows, and x is such that x Gᵀ are sure logits."""
    made = experts(draw)
    Q = torch.linalg.qr(draw.normal(draw.K, len(made["B"]))).Q
    x = base["x"] - base["x"] @ Q @ Q.T + sure_logits(draw, len(made["B"])) @ Q.T
    return made | {"x": x, "router": Q.T.contiguous()}


def top_k(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Each token's best experts, renormalised."""
    return routed(draw, base) | {"top_k": min(TOP_K, experts_of(draw))}


def top_k_plain(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Each token's best experts, as probable as they are."""
    return top_k(draw, base) | {"renormalize": False}


def shared_a(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """HydraLoRA: every expert, one A."""
    made = routed(draw, base)
    return made | {"A": made["A"][0]}


def gates(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Given weights of both signs, some 0, and a learned scale for each expert."""
    E = experts_of(draw)
    given = draw.normal(draw.T, E)
    return experts(draw) | {"gates": torch.where(given.abs() < 0.3, 0.0, given), "scale": 1 + 0.1 * draw.normal(E)}


def goat(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw a mixture with the start subtracted, scales of their own for each expert, some tokens
    not counted.
    """
    made, E = top_k(draw, base), experts_of(draw)
    start = {"frozen_A": 0.5 * made["A"], "frozen_B": made["B"] + 0.5 * draw.normal(*made["B"].shape) / draw.K**0.5}
    made |= {"scale": 1.25 + 0.1 * draw.normal(E), "residual": 0.5 + 0.1 * draw.normal(E)}
    return made | start | {"token_mask": torch.arange(draw.T) % 3 != 1}


def dora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """With a magnitude of both signs over a mixture with the start subtracted."""
    made = goat(draw, base)
    del made["token_mask"]
    return made | {"magnitude": base["weight"].norm(dim=1) * (1 + draw.normal(draw.N))}


_MOE = "moe_lora_linear"
_START = ("frozen_A", "frozen_B", "residual", "token_mask")

METHODS = (
    Method("moe", _MOE, top_k),
    Method("moe-plain-dropout", _MOE, top_k_plain, dropout_p=DROPOUT_P),
    Method("moe-shared-a", _MOE, shared_a),
    Method("moe-gates", _MOE, gates),
    Method("goat", _MOE, goat, _START),
    Method("goat-dora", _MOE, dora, _START, through_x=("dmagnitude",)),
    Method("goat-dropout", _MOE, goat, _START, dropout_p=DROPOUT_P, fused_only={"dropout": "independent"}),
)
