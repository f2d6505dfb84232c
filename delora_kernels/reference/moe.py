"""Mixtures of LoRA experts: every token's update is a weighted sum of low-rank updates.

    y_t = W x_t + Σ_e w_te · s_e · B_e A_e x_t + bias − Σ_j γ_j · B⁰_j A⁰_j x_t

w is a router's softmax over the experts, kept for the k largest and renormalised (GOAT, MixLoRA,
MoLA) or not, or dense (LoRAMoE, HydraLoRA, whose experts share one A); or it is given. The last
sum, constant, is GOAT's residual. Fan et al., "Make LoRA Great Again" (arXiv:2502.16894), equations
10 and 26-28.

With a magnitude m, DoRA over the mixture, what is not bias is multiplied by c = m / ‖W̄‖ by rows, a
constant but for m, of the mean-gate weight W̄ = W + 1/E Σ_e s_e B_e A_e − Σ_j γ_j B⁰_j A⁰_j: this
library's own definition. A row of W̄ that is zero has c = 0.

Two specifications that share only the routing: `moe_lora_linear` loops over experts and the tokens
that chose them, as the authors' code does; `moe_lora_linear_dense` runs every expert on every
token.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class RouterStats(NamedTuple):
    """What a mixture's losses are made of.

    Args:
        fraction: f `[E]`, the share of counted tokens that chose expert e; a constant.
        probability: P `[E]`, the mean over counted tokens of p_te, or of given gates.
        z: Mean over counted tokens of logsumexp(logits)², 0-d; 0 where the gates are given, and of
            one expert, for which a router has nothing to choose.
        top_k: Experts a token chooses.
    """

    fraction: Tensor
    probability: Tensor
    z: Tensor
    top_k: int

    def balance_loss(self, convention: str = "code") -> Tensor:
        """E Σ_e f_e P_e ("code"), or that over k ("paper", equations 26-28): at perfect balance k,
        or 1.
        """
        loss = len(self.fraction) * (self.fraction * self.probability).sum()
        return loss / self.top_k if convention == "paper" else loss


def moe_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None = None,
    *,
    gates: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    residual: float | Tensor = 1.0,
    magnitude: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, RouterStats]:
    """Apply a frozen linear with a mixture of low-rank experts, one expert after the other.

    Args:
        x: `[..., K]`, any float dtype, which all tensors share; T tokens.
        weight: W, `[N, K]`, nn.Linear's layout.
        A: `[E, r, K]`, or `[r, K]`: one that all experts share.
        B: `[E, N, r]`.
        router: G, `[E, K]`: logits x Gᵀ, of the x that is not dropped.
        gates: w itself, `[..., E]`, in place of a router.
        adapter_ids: `[...]`, ints: the one expert of each token, −1 for none, in place of a router.
        top_k: How many experts a router keeps for a token, those of the lowest index where logits
            tie; None: all.
        renormalize: Divide the kept probabilities by their sum.
        scale: s, a number or `[E]`.
        bias: `[N]` or None.
        token_mask: `[...]`, bool: the tokens that `RouterStats` counts; None: all.
        frozen_A, frozen_B: The constant pairs, `[J, r₀, K]` and `[J, N, r₀]`, or None.
        residual: γ, a number or `[J]`.
        magnitude: m, `[N]`, or None: c is 1.
        dropout_mask: Entries 0 or 1 / (1 − p) on the experts' input: `[T, K]`, or one for each
            expert `[E, T, K]`.

    Returns:
        y, `[..., N]`, and the router's statistics.

    Source: arXiv:2502.16894, equation 10; the loop of the authors' `TopKGOATLayer`.
    """
    tokens = x.reshape(-1, x.shape[-1])
    w, stats = _routed(tokens, len(B), router, gates, adapter_ids, top_k, renormalize, token_mask)
    y = tokens @ weight.T
    for e, (B_e, s_e) in enumerate(zip(B, _each(scale, B), strict=True)):
        kept = w[:, e] != 0 if gates is None else w.new_ones(len(w))  # a given gate of 0 may be learned
        rows = kept.nonzero().squeeze(1)
        mask = dropout_mask if dropout_mask is None or dropout_mask.dim() == 2 else dropout_mask[e]
        inputs = tokens[rows] if mask is None else tokens[rows] * mask[rows]
        update = (inputs @ (A if A.dim() == 2 else A[e]).T) @ B_e.T
        y = y.index_add(0, rows, (w[rows, e, None] * s_e * update).to(y.dtype))
    if frozen_A is not None and frozen_B is not None:
        for A_j, B_j, gamma in zip(frozen_A, frozen_B, _each(residual, frozen_B), strict=True):
            y = y - gamma * (tokens @ A_j.T) @ B_j.T
    if magnitude is not None:
        with torch.no_grad():
            mean = weight.clone()
            for e, (B_e, s_e) in enumerate(zip(B, _each(scale, B), strict=True)):
                mean += s_e / len(B) * B_e @ (A if A.dim() == 2 else A[e])
            if frozen_A is not None and frozen_B is not None:
                for A_j, B_j, gamma in zip(frozen_A, frozen_B, _each(residual, frozen_B), strict=True):
                    mean -= gamma * B_j @ A_j
            norm = torch.stack([row.norm() for row in mean])
        y = y * (magnitude / torch.where(norm == 0, torch.inf, norm))
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], len(weight)), stats


def moe_lora_linear_dense(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    router: Tensor | None = None,
    *,
    gates: Tensor | None = None,
    adapter_ids: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    scale: float | Tensor = 1.0,
    bias: Tensor | None = None,
    token_mask: Tensor | None = None,
    frozen_A: Tensor | None = None,
    frozen_B: Tensor | None = None,
    residual: float | Tensor = 1.0,
    magnitude: Tensor | None = None,
    dropout_mask: Tensor | None = None,
) -> tuple[Tensor, RouterStats]:
    """Apply the same map with every expert on every token: h = x Âᵀ, v = w ⊙ s ⊙ h, y = x Wᵀ + v
    B̂ᵀ − γ ⊙ (x Â⁰ᵀ) B̂⁰ᵀ + bias.

    Â and B̂ hold the experts' factors one beside the other, Â⁰ and B̂⁰ the constant pairs.

    Args:
        x, weight, A, B, router, gates, adapter_ids, top_k, renormalize, scale, bias, token_mask,
            frozen_A, frozen_B, residual, magnitude, dropout_mask: as in `moe_lora_linear`.

    Returns:
        y, `[..., N]`, and the router's statistics.

    Source: arXiv:2502.16894, equation 10.
    """
    tokens = x.reshape(-1, x.shape[-1])
    w, stats = _routed(tokens, len(B), router, gates, adapter_ids, top_k, renormalize, token_mask)
    dropped = (tokens if dropout_mask is None else tokens * dropout_mask).to(A.dtype)
    E, _, r = B.shape
    if dropped.dim() == 2:
        h = (dropped @ A.reshape(-1, A.shape[-1]).T).unflatten(1, (-1, r)).expand(-1, E, r)
    else:
        h = torch.einsum("etk,erk->ter", dropped, A.expand(E, r, -1))
    factor = (w * scale).unsqueeze(2)
    v = factor * torch.where((w.unsqueeze(2) == 0) & ~h.isfinite(), 0.0, h)
    y = tokens @ weight.T + v.to(B.dtype).flatten(1) @ B.transpose(1, 2).flatten(0, 1)
    if frozen_A is not None and frozen_B is not None:
        start = (tokens.to(frozen_A.dtype) @ frozen_A.flatten(0, 1).T).unflatten(1, frozen_A.shape[:2])
        start = (start * torch.as_tensor(residual).reshape(-1, 1)).to(frozen_B.dtype)
        y = y - start.flatten(1) @ frozen_B.transpose(1, 2).flatten(0, 1)
    if magnitude is not None:
        y = (magnitude * _inverse_norm(weight, A, B, scale, frozen_A, frozen_B, residual) * y).to(y.dtype)
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], weight.shape[0]), stats


def _inverse_norm(
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float | Tensor,
    frozen_A: Tensor | None,
    frozen_B: Tensor | None,
    residual: float | Tensor,
) -> Tensor:
    """1 / ‖W̄‖ by rows, a constant; 0 where the row is zero."""
    E, dtype = len(B), torch.promote_types(B.dtype, torch.float32)
    s, gamma = (torch.as_tensor(each, dtype=dtype, device=B.device) for each in (scale, residual))
    mean = torch.einsum("e,enr,erk->nk", s.expand(E) / E, B.to(dtype), A.to(dtype).expand(E, -1, -1)) + weight
    if frozen_A is not None and frozen_B is not None:
        mean = mean - torch.einsum("j,jnr,jrk->nk", gamma.expand(len(frozen_B)), frozen_B.to(dtype), frozen_A.to(dtype))
    squared = mean.detach().square().sum(1)
    return torch.where(squared == 0, 0.0, squared.rsqrt())


def _each(value: float | Tensor, experts: Tensor) -> list[float] | Tensor:
    """Return a number, or a tensor of one for each expert, as one for each."""
    return value if isinstance(value, Tensor) and value.dim() else [value] * len(experts)  # type: ignore[list-item]


def _routed(
    tokens: Tensor,
    E: int,
    router: Tensor | None,
    gates: Tensor | None,
    adapter_ids: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    token_mask: Tensor | None,
) -> tuple[Tensor, RouterStats]:
    """w [T, E], zero where an expert is not chosen, and the statistics."""
    T, dtype = tokens.shape[0], torch.promote_types(tokens.dtype, torch.float32)  # of the gating
    z = tokens.new_zeros(T, dtype=dtype)
    if router is not None:
        k = E if top_k is None else top_k
        logits = (tokens.to(router.dtype) @ router.T).to(dtype)
        p = probability = logits.softmax(1)
        before = logits[:, None] > logits[:, :, None]  # [T, e, j]: j comes before e; no sort, which ONNX lacks
        tie = torch.ones(E, E, dtype=torch.bool, device=tokens.device).tril(-1)  # the lowest index wins one
        chosen = (before | ((logits[:, None] == logits[:, :, None]) & tie)).sum(2) < k
        w = torch.where(chosen, p, 0.0)
        if renormalize:
            w = w / w.sum(1, keepdim=True)
        z = z if E == 1 else logits.logsumexp(1).square()
    else:
        k = 1 if gates is None else E
        if gates is None:
            gates = adapter_ids.reshape(T, 1) == torch.arange(E, device=tokens.device)  # type: ignore[union-attr]
        w = probability = gates.reshape(T, E).to(dtype)
        chosen = w != 0
    counted = chosen.new_ones(T) if token_mask is None else token_mask.reshape(T)
    n = counted.sum().clamp(min=1)
    fraction, probability = (
        torch.where(counted[:, None], of, 0.0).sum(0) / n for of in (chosen.to(dtype), probability)
    )
    z = torch.where(counted, z, 0.0).sum() / n
    return w, RouterStats(fraction, probability, z, k)
