"""lora_linear: LoRA and rsLoRA, one adapter or several stacked."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.call import Call
from delora_kernels.functional.common import low_rank_call, run


def lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    ranks: Sequence[int] | None = None,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with a low-rank update.

        y = x Wᵀ + scale · drop(x) Aᵀ Bᵀ + bias

    rsLoRA is scale = alpha / √r. Several adapters are one of their summed rank, A and B stacked.

    Args:
        x: Input, `[..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r, K]`.
        B: `[N, r]`.
        scale: Factor s of the update, usually alpha / r.
        bias: `[N]` or None.
        ranks: Ranks of the adapters stacked in A's rows and B's columns, each with its own dropout
            mask; None: one.
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1); one for each
            of `ranks`, or one for all.
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask (seed + i that of
            adapter i); None draws from torch's generator.

    Returns:
        y, `[..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        RuntimeError: the requested backend can't take the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq.
    3.
    """
    call = lora_call(x, weight, A, B, scale, bias, ranks=ranks, dropout_p=dropout_p, seed=seed)
    return run(AdaptedLinear, call, x.shape)[0]


def lora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    ranks: Any = None,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> Call:
    """Check the arguments of `lora_linear` and make its call."""
    name = "lora_linear"
    checks.low_rank(name, x, weight, bias, A, B)
    scale = checks.number(name, "scale", scale)
    ranks = checks.ranks(name, ranks, A)
    dropout_p = checks.probabilities(name, dropout_p, ranks)
    return low_rank_call(name, x, weight, bias, A, B, scale=scale, ranks=ranks, dropout_p=dropout_p, seed=seed)
