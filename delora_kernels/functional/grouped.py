"""grouped_lora_linear: the linears of an expert model, each with a low-rank update of its own; what
the functions for such linears check alike.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd.grouped import GroupedLinear
from delora_kernels.call import GroupedCall, GroupedOptions
from delora_kernels.functional.common import dtypes, run, seeds

_NAME = "grouped_lora_linear"


def grouped_lora_linear(
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: float = 1.0,
    bias: Tensor | None = None,
    *,
    dropout_p: float = 0.0,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply to the rows of every expert its frozen linear with its low-rank update.

        y_e = x_e W_eᵀ + scale · drop(x_e) A_eᵀ B_eᵀ + bias_e

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
        dropout_p: Probability of dropping an element of the branch's input, in [0, 1): each row has
            its own, also where several are copies of one token.
        seed: Int or 0-d int64 tensor on x's device that fixes the dropout mask `[T, K]`; None draws
            from torch's generator.

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
    call = grouped_lora_call(x, weight, A, B, offsets, scale, bias, dropout_p=dropout_p, seed=seed)
    return run(GroupedLinear, call, x.shape)[0]


def grouped_lora_call(
    x: Any,
    weight: Any,
    A: Any,
    B: Any,
    offsets: Any,
    scale: Any = 1.0,
    bias: Any = None,
    *,
    dropout_p: Any = 0.0,
    seed: Any = None,
) -> GroupedCall:
    """Check the arguments of `grouped_lora_linear` and make its call."""
    check_grouped(_NAME, x, weight, A, B, offsets, bias)
    return grouped_call(_NAME, x, weight, A, B, offsets, scale, bias, dropout_p=dropout_p, seed=seed)


def check_grouped(name: str, x: Any, weight: Any, A: Any, B: Any, offsets: Any, bias: Any) -> None:
    """Check what the functions for an expert model's linears have in common."""
    checks.no_transforms(name, (x, weight, bias, A, B), f"reference.{name}")
    x, weight = _cube(name, checks.tensor(name, "x", x), "x", 2, "[T, K]"), checks.tensor(name, "weight", weight)
    E, N, K = _cube(name, weight, "weight", 3, "[E, N, K]").shape
    if x.shape[1] != K:
        remedy = "weight is [E, N, K]; pass weight.mT of one that is [E, K, N]"
        raise checks.fail(ValueError, name, "x", f"[T, K] with K = {K}", f"shape {list(x.shape)}", remedy)
    autocast = torch.is_autocast_enabled(x.device.type) and torch.float64 not in (x.dtype, weight.dtype)
    if x.dtype != weight.dtype and not autocast:
        remedy = "cast x, or use torch.autocast"
        raise checks.fail(TypeError, name, "x", f"{weight.dtype}, weight's dtype", x.dtype, remedy)
    A, B = checks.tensor(name, "A", A), checks.tensor(name, "B", B)
    r = _cube(name, A, "A", 3, "[E, r, K]").shape[1]
    if r == 0:
        raise checks.fail(ValueError, name, "A", "[E, r, K] with r ≥ 1", list(A.shape), "use the frozen linears alone")
    checks.shape(name, "A", A, (E, r, K), "[E, r, K]", "one matrix for each expert of weight")
    checks.shape(name, "B", B, (E, N, r), "[E, N, r]", "one matrix for each expert of weight")
    if bias is not None:
        bias = checks.tensor(name, "bias", bias)
        checks.shape(name, "bias", bias, (E, N), "[E, N]", "one row for each expert of weight, or None")
    if not isinstance(offsets, Tensor) or offsets.dtype not in (torch.int32, torch.int64):
        got = offsets.dtype if isinstance(offsets, Tensor) else type(offsets).__name__
        remedy = "pass the cumulative sum of the experts' numbers of rows"
        raise checks.fail(TypeError, name, "offsets", "an int32 or int64 tensor", got, remedy)
    checks.shape(name, "offsets", offsets, (E,), "[E]", "one end for each expert of weight")
    for argument, value in (("weight", weight), ("A", A), ("B", B), ("bias", bias), ("offsets", offsets)):
        if value is not None:
            checks.same_device(name, argument, value, x)


def grouped_call(
    name: str,
    x: Tensor,
    weight: Tensor,
    A: Tensor,
    B: Tensor,
    offsets: Tensor,
    scale: Any,
    bias: Tensor | None,
    *,
    dropout_p: Any,
    seed: Any,
    magnitude: Tensor | None = None,
) -> GroupedCall:
    """Make a call of arguments that are checked but for scale, dropout_p and seed."""
    p = checks.probabilities(name, dropout_p, ())
    seed = seeds(name, seed, x) if any(p) else None
    options = GroupedOptions(name, checks.number(name, "scale", scale), p, *dtypes(x, weight, A, B))
    return GroupedCall(x, weight, bias, A, B, magnitude, offsets, None, None, seed, options)


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
    return run(GroupedLinear, routed_call(x, weight, bias, factors, offsets, rows, places), x.shape)[0]


def routed_call(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    factors: tuple[Tensor, Tensor, float] | None,
    offsets: Tensor,
    rows: Tensor | None = None,
    places: Tensor | None = None,
) -> GroupedCall:
    """Make the call of `run_routed`."""
    A, B, scale = factors or (None, None, 1.0)
    found = dtypes(x, weight, *(each for each in (A, B) if each is not None))
    options = GroupedOptions(_NAME, scale, (0.0,), *found)
    return GroupedCall(x, weight, bias, A, B, None, offsets, rows, places, None, options)


def _cube(name: str, value: Tensor, argument: str, dims: int, letters: str) -> Tensor:
    """Check the number of dimensions."""
    if value.dim() != dims:
        raise checks.fail(
            ValueError, name, argument, f"{dims}-D {letters}", f"shape {list(value.shape)}", "see the docstring"
        )
    return value
