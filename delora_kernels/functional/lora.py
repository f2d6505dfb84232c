"""lora_linear: LoRA and rsLoRA, one adapter or several stacked. lora_linears: several linears of
one x.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from delora_kernels import checks, dispatch
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.call import Call
from delora_kernels.functional.common import low_rank_call, run, run_linears
from delora_kernels.functional.planned import at_a_glance, learn_glance, linears_at_a_glance


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
    key = None
    if ranks is None and (dispatch._requested is not None or not getattr(x, "is_cpu", True)):
        key, y = at_a_glance("lora_linear", (x, weight, bias, A, B), dropout_p, scale)
        if y is not None:
            return y
    call = lora_call(x, weight, A, B, scale, bias, ranks=ranks, dropout_p=dropout_p, seed=seed)
    y = run(AdaptedLinear, call, x.shape)[0]
    if key is not None:
        learn_glance(key, call)
    return y


def lora_linears(
    x: Tensor,
    weights: Sequence[Tensor],
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    scale: float | Sequence[float] = 1.0,
    biases: Sequence[Tensor | None] | None = None,
    *,
    dropout_p: float | Sequence[float] = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Apply several frozen linears with low-rank updates to one x, such as the query, key and value
    projections.

        y_i = x W_iᵀ + scale_i · drop_i(x) A_iᵀ B_iᵀ + bias_i

    What `lora_linear` gives one by one, to rounding; but x is read once for all A, and its gradient
    is one buffer instead of one for each linear and their sums. An output without a gradient costs
    nothing in backward, and leaves the gradients of its own factors None.

    Args:
        x: Input, `[..., K]`.
        weights: Frozen weights W_i, `[N_i, K]` each.
        A: `[r_i, K]` each.
        B: `[N_i, r_i]` each.
        scale: Factor of each update, or one for all.
        biases: `[N_i]` or None each; None: no linear has one.
        dropout_p: Probability of dropping an element of a branch's input, in [0, 1), each with its
            own mask; or one for all.
        seed: Int or 0-d int64 tensor on x's device: seed + i fixes the mask of linear i; None draws
            from torch's generator.

    Returns:
        y_i, `[..., N_i]` each, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it, the linear and the
            remedy.
        RuntimeError: the requested backend can't take the call.
    """
    count = _count("lora_linears", weights=weights, A=A, B=B, biases=biases, scale=scale, dropout_p=dropout_p)
    scales = scale if isinstance(scale, Sequence) else [scale] * count
    dropouts = dropout_p if isinstance(dropout_p, Sequence) else [dropout_p] * count
    given = [*zip(weights, biases or [None] * count, A, B, dropouts, scales, strict=True)]
    key, outputs = linears_at_a_glance(x, [("lora_linear", each[:4], each[4], each[5:]) for each in given])
    if outputs is not None:
        return outputs
    calls = []
    for i, (weight, bias, A_i, B_i, p_i, scale_i) in enumerate(given):
        try:
            own = None if seed is None else seed + i
            calls.append(lora_call(x, weight, A_i, B_i, scale_i, bias, dropout_p=p_i, seed=own))
        except (TypeError, ValueError) as error:
            raise type(error)(f"lora_linears, linear {i}: {error}") from None
    return run_linears(calls, x.shape, key)


def _count(name: str, **given: Any) -> int:
    """Return how many linears are given, by the weights; all other sequences must be as long."""
    for key, value in given.items():
        one_for_all = key in ("scale", "dropout_p") and not isinstance(value, Sequence)
        if one_for_all or (key == "biases" and value is None):
            continue
        if not isinstance(value, Sequence):
            raise TypeError(f"{name}: {key} must be a list or tuple, one for each linear, got a {type(value).__name__}")
        if len(value) != len(given["weights"]) or not value:
            expected = (
                f"{len(given['weights'])} values, one for each of weights" if given["weights"] else "one linear or more"
            )
            raise ValueError(f"{name}: {key} must hold {expected}, got {len(value)}")
    return len(given["weights"])


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
