"""grouped_lora_linear: the linears of an expert model, each with a low-rank update of its own."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.grouped import GroupedLinear
from delora_kernels.call import GroupedCall, GroupedOptions
from delora_kernels.functional.common import dtypes, run

_NAME = "grouped_lora_linear"


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its frozen linear with its low-rank update.

        y_e = x_e W_eᵀ + scale · x_e A_eᵀ B_eᵀ + bias_e

    Nothing of the size of all experts' weights is made, forward or backward; W gets a gradient only
    if it requires one.

    Args:
        x: Input sorted by expert, `[T, K]`: the rows of expert 0 first, then those of expert 1, ...
        weight: Frozen weights, `[E, N, K]`, any strides: pass weights that lie as `[E, K, N]` as
            `weight.mT`.
        A: `[E, r, K]`.
        B: `[E, N, r]`.
        offsets: Where the rows of each expert end, int32 or int64 `[E]` on x's device: the
            cumulative sum of the experts' numbers of rows. Rows behind the last one belong to no
            expert.
        scale: Factor s of the update, usually alpha / r.
        bias: `[E, N]` or None.

    Returns:
        y, `[T, N]`, in weight's dtype (autocast's dtype under autocast). Rows that belong to no
        expert are 0, in y and in the gradient of x, whatever x holds there.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy. Offsets
            that fall, or pass x's end, raise where they can be read without waiting for a device.
        RuntimeError: the requested backend can't take the call.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq.
    3, for each expert.
    """
    call = grouped_lora_call(x, weight, A, B, offsets, scale, bias)
    return run(GroupedLinear, call, x.shape)[0]


def grouped_lora_call(
    x: Any, weight: Any, A: Any, B: Any, offsets: Any, scale: Any = 1.0, bias: Any = None
) -> GroupedCall:
    """Check the arguments of `grouped_lora_linear` and make its call."""
    checks.no_transforms(_NAME, (x, weight, bias, A, B), f"reference.{_NAME}")
    x, weight = _cube(checks.tensor(_NAME, "x", x), "x", 2, "[T, K]"), checks.tensor(_NAME, "weight", weight)
    E, N, K = _cube(weight, "weight", 3, "[E, N, K]").shape
    if x.shape[1] != K:
        remedy = "weight is [E, N, K]; pass weight.mT of one that is [E, K, N]"
        raise checks.fail(ValueError, _NAME, "x", f"[T, K] with K = {K}", f"shape {list(x.shape)}", remedy)
    autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not autocast:
        remedy = "cast x, or use torch.autocast"
        raise checks.fail(TypeError, _NAME, "x", f"{weight.dtype}, weight's dtype", x.dtype, remedy)
    A, B = checks.tensor(_NAME, "A", A), checks.tensor(_NAME, "B", B)
    r = _cube(A, "A", 3, "[E, r, K]").shape[1]
    if r == 0:
        raise checks.fail(ValueError, _NAME, "A", "[E, r, K] with r ≥ 1", list(A.shape), "use the frozen linears alone")
    checks.shape(_NAME, "A", A, (E, r, K), "[E, r, K]", "one matrix for each expert of weight")
    checks.shape(_NAME, "B", B, (E, N, r), "[E, N, r]", "one matrix for each expert of weight")
    if bias is not None:
        bias = checks.tensor(_NAME, "bias", bias)
        checks.shape(_NAME, "bias", bias, (E, N), "[E, N]", "one row for each expert of weight, or None")
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        remedy = "pass the cumulative sum of the experts' numbers of rows"
        raise checks.fail(TypeError, _NAME, "offsets", "an int32 or int64 tensor", got, remedy)
    checks.shape(_NAME, "offsets", offsets, (E,), "[E]", "one end for each expert of weight")
    for name, value in (("weight", weight), ("A", A), ("B", B), ("bias", bias), ("offsets", offsets)):
        if value is not None:
            checks.same_device(_NAME, name, value, x)
    options = GroupedOptions(_NAME, checks.number(_NAME, "scale", scale), *dtypes(x, weight, A, B))
    return GroupedCall(x, weight, bias, A, B, offsets, None, None, options)


def run_routed(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None,
    offsets: Tensor,
    rows: Tensor | None = None,
    places: Tensor | None = None,
) -> Tensor:
    """Apply `grouped_lora_linear` to arguments that are known to fit.

    Args:
        x, weight, bias, offsets: As there.
        factors: A, B and scale; None: the frozen linears alone.
        rows, places: As in `GroupedCall`, of an x that holds tokens.
    """
    A, B, scale = factors or (None, None, 1.0)
    options = GroupedOptions(_NAME, scale, *dtypes(x, weight, *(each for each in (A, B) if each is not None)))
    call = GroupedCall(x, weight, bias, A, B, offsets, rows, places, options)
    return run(GroupedLinear, call, x.shape)[0]


def _cube(value: Tensor, argument: str, dims: int, letters: str) -> Tensor:
    """Check the number of dimensions."""
    if value.dim() != dims:
        raise checks.fail(
            ValueError, _NAME, argument, f"{dims}-D {letters}", f"shape {list(value.shape)}", "see the docstring"
        )
    return value
