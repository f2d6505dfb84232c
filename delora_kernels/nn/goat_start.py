"""How a mixture of LoRA experts starts: GOAT's segments of the weight's singular values, PiSSA's
and MiLoRA's, scales.

With W = U diag(σ) Vᵀ and a set of r singular triples for expert e,

    A_e = diag(√σ') V_eᵀ,   B_e = U_e diag(√σ'),   σ' = σ_e / (s_e ρ),
    so that s_e B_e A_e = U_e diag(σ_e) V_eᵀ / ρ

Fan et al., "Make LoRA Great Again" (arXiv:2502.16894), equations 13-19; Facico/GOAT-PEFT,
`goat/peta/src/goat/layer.py`. The SVD is float32 whatever the weight's dtype; the sign of every
triple is fixed: the largest entry of V_i is positive.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from delora_kernels import checks

STARTS = ("goat", "goat_mini", "pissa", "milora", "half", "zero")
SCALINGS = ("theory", "alpha/r", "rslora", "goat-s")


class Start(NamedTuple):
    """The first factors of a mixture, float32.

    Args:
        A: `[E, r, K]`.
        B: `[E, N, r]`.
        scale: s, `[E]`.
        error: ‖W V − U diag(σ)‖ / ‖σ‖ over the triples taken: rounding (about 1e-6) for the full
            SVD, for the randomised one how well it found them; 0 for "zero".
    """

    A: Tensor
    B: Tensor
    scale: Tensor
    error: float


def moe_start(
    weight: Tensor,
    experts: int,
    r: int,
    start: str = "goat",
    scaling: str | float | Sequence[float] = "theory",
    *,
    alpha: float = 16.0,
    eta: float = 1.0,
    rho: float = 10.0,
    svd: str = "full",
) -> Start:
    """Return the factors and scales with which a mixture starts on `weight`.

    Args:
        weight: W, `[N, K]`; not written.
        experts: E.
        r: Rank of each expert.
        start: Which triples, of h = min(N, K) in descending order, t = h // E: "goat" expert e the
            first r of its chunk [e t, (e + 1) t); "goat_mini" the last r of it; "pissa" the first E
            r of all; "milora" the last E r; "half" the first and the last E r / 2. "zero": A
            Kaiming uniform (a = √5, from torch's generator), B 0.
        scaling: "theory" √(3 η K / r) (their Theorem 3.5); "alpha/r"; "rslora" alpha / √r; "goat-s"
            theory's for the first expert, that of expert e times √(Σσ_0 / Σσ_e) (equation 83); a
            number; or one for each expert.
        alpha: Of "alpha/r" and "rslora".
        eta: η, the learning rate of full fine-tuning over LoRA's.
        rho: ρ, by which the start is damped.
        svd: "full", or "randomized" (`torch.svd_lowrank`, for large weights): it finds the largest
            triples only, so it serves "pissa"; see `Start.error`.

    Returns:
        The `Start`, on weight's device.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: arXiv:2502.16894, equations 13-19, 83 and Theorem 3.5.
    """
    name = "moe_start"
    weight = checks.matrix(name, "weight", weight, "[N, K]").detach().float()
    checks.option(name, "start", start, STARTS)
    checks.option(name, "svd", svd, ("full", "randomized"))
    N, K = weight.shape
    if start == "zero":
        scale = _scales(scaling, experts, r, K, alpha, eta, None, weight)
        A = weight.new_empty(experts, r, K).uniform_(-1 / math.sqrt(K), 1 / math.sqrt(K))  # Kaiming, a = √5
        return Start(A, weight.new_zeros(experts, N, r), scale, 0.0)
    index = _triples(name, min(N, K), experts, r, start)
    if svd == "randomized" and start != "pissa":
        remedy = "take svd='full', or start='pissa'"
        raise checks.fail(ValueError, name, "svd", f"'full' for start={start!r}", "'randomized'", remedy)
    U, sigma, V = _svd(weight, experts * r if svd == "randomized" else None)
    U, sigma, V = U[:, index], sigma[index], V[:, index]
    error = float((weight @ V - U * sigma).norm() / sigma.norm().clamp(min=torch.finfo(torch.float32).tiny))
    sigma = sigma.view(experts, r)
    scale = _scales(scaling, experts, r, K, alpha, eta, sigma.sum(1), weight)
    root = (sigma / (scale[:, None] * rho)).sqrt()
    A = root.unsqueeze(2) * V.T.reshape(experts, r, K)
    B = U.view(N, experts, r).transpose(0, 1) * root.unsqueeze(1)
    return Start(A, B, scale, error)


def _triples(name: str, h: int, E: int, r: int, start: str) -> Tensor:
    """Return the indices of the triples of all experts, one expert after the other."""
    t = h // E
    if r > t:
        expected = f"at most min(N, K) // E = {t}"
        raise checks.fail(ValueError, name, "r", expected, r, "take fewer experts or a lower rank")
    chunks = torch.arange(E)[:, None] * t + torch.arange(r)
    if start == "goat_mini":
        chunks = chunks + t - r
    elif start == "pissa":
        chunks = torch.arange(E * r)
    elif start == "milora":
        chunks = torch.arange(h - E * r, h)
    elif start == "half":
        first = E * r // 2
        chunks = torch.cat([torch.arange(first), torch.arange(h - E * r + first, h)])
    return chunks.flatten()


def _svd(weight: Tensor, q: int | None) -> tuple[Tensor, Tensor, Tensor]:
    """U [N, ·], σ, V [K, ·], each V's largest entry positive."""
    if q is None:
        U, sigma, Vh = torch.linalg.svd(weight, full_matrices=False)
        V = Vh.T
    else:
        U, sigma, V = torch.svd_lowrank(weight, q=min(q + 10, *weight.shape), niter=4)
    largest = V.gather(0, V.abs().argmax(0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)
    return U * sign, sigma, V * sign


def _scales(
    scaling: str | float | Sequence[float],
    E: int,
    r: int,
    K: int,
    alpha: float,
    eta: float,
    sums: Tensor | None,
    like: Tensor,
) -> Tensor:
    """s of each expert, [E]."""
    name = "moe_start"
    if isinstance(scaling, str):
        checks.option(name, "scaling", scaling, SCALINGS)
        theory = math.sqrt(3 * checks.number(name, "eta", eta) * K / r)
        by_name = {"alpha/r": alpha / r, "rslora": alpha / math.sqrt(r)}
        scale = like.new_full((E,), by_name.get(scaling, theory))
        return scale if scaling != "goat-s" or sums is None else scale * (sums[0] / sums).sqrt()
    if isinstance(scaling, (int, float)):
        return like.new_full((E,), checks.number(name, "scaling", scaling))
    if len(scaling) != E:
        raise checks.fail(ValueError, name, "scaling", f"one for each of {E} experts", list(scaling), "pass E numbers")
    return like.new_tensor([checks.number(name, "scaling", each) for each in scaling])
