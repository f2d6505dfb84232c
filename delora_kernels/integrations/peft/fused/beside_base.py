"""A layer whose base can't be read: the base runs its own forward, and the low-rank branch, fused,
is added to what comes out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels import functional
from delora_kernels.functional.rank_term import add_rank_term
from delora_kernels.integrations.peft.verdict import log_once


@dataclass(frozen=True)
class BesideRun:
    """x → y of a layer beside its base.

    Args:
        reason: Why the base can't be read.
        base_layer: Runs as it is, under autograd.
        factors: () → A [R, K], B [N, R] and scale of all active adapters.
        ranks: Their ranks, of several stacked; (): one.
        dropout_p: What each of them drops with.
        bias: () → [N] or None, what the adapters' own biases add.
        keeps_dtype: Whether the output comes in x's dtype, as of PEFT's DeLoRA.
    """

    reason: str
    base_layer: nn.Module
    factors: Callable[[], tuple[Tensor, Tensor, float]]
    ranks: tuple[int, ...]
    dropout_p: tuple[float, ...]
    bias: Callable[[], Tensor | None]
    keeps_dtype: bool

    def __call__(self, x: Tensor) -> Tensor:
        log_once("an accelerated layer runs its base's own forward, and the rank term alone fused", self.reason)
        y: Any = self.base_layer(x)
        A, B, scale = self.factors()
        y = add_rank_term(y, x, A, B, scale, ranks=self.ranks, dropout_p=self.dropout_p)
        bias = self.bias()
        if bias is not None:
            y = (y + bias).to(y.dtype)
        return y.to(x.dtype) if self.keeps_dtype else y

    def why_not(self, x: Tensor) -> str | None:
        """Say why x is left to PEFT's own forward, or None."""
        return None


def beside(adapters: list[Any], base_layer: nn.Module, is_delora: bool, reason: str) -> BesideRun | str:
    """Plan the rank term alone, beside a base that runs its own forward.

    Of DoRA, which rescales what the base gives, return the reason.
    """
    if any("magnitude" in adapter.tensors for adapter in adapters):
        return reason
    factors = functional.delora_factors if is_delora else as_they_are
    ranks = tuple(next(iter(adapter.tensors.values())).shape[0] for adapter in adapters)

    def made() -> tuple[Tensor, Tensor, float]:
        if len(adapters) > 1:
            return stack(factors, adapters)
        A, B = factors(*adapters[0].tensors.values())
        return A, B, adapters[0].scale

    dropout_p, bias = tuple(adapter.dropout_p for adapter in adapters), partial(sum_of_biases, adapters, None)
    return BesideRun(reason, base_layer, made, ranks if len(ranks) > 1 else (), dropout_p, bias, is_delora)


def as_they_are(A: Tensor, B: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Return LoRA's factors A [r, K] and B [N, r], which need no folding; `bias` is added apart."""
    return A, B


def sum_of_biases(adapters: list[Any], total: Tensor | None) -> Tensor | None:
    """Return total + Σ scale · bias over the adapters whose lora_B has one (PEFT's lora_bias), in
    the widest dtype among them.
    """
    for adapter in adapters:
        bias = adapter.tensors.get("lora_bias")
        if bias is not None:
            total = bias * adapter.scale if total is None else total + bias * adapter.scale
    return total


def stack(factors: Callable[..., Any], adapters: list[Any]) -> tuple[Tensor, Tensor, float]:
    """Make A and B of several adapters those of one, and say its scale."""
    A, B = zip(*(factors(*adapter.tensors.values()) for adapter in adapters), strict=True)
    scales = [adapter.scale for adapter in adapters]
    # not the largest: the others' B, divided by it, would sink below float16's normal numbers
    scale = scales[0] if all(s == scales[0] for s in scales) else 1.0
    with torch.autocast(A[0].device.type, enabled=False):  # its cat refuses the half precision that is not autocast's
        A_all = torch.cat(A)
        B_all = torch.cat([b if s == scale else b * s for b, s in zip(B, scales, strict=True)], dim=1)
    return A_all, B_all, scale
