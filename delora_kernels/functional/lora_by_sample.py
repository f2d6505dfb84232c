"""lora_linear_by_sample: LoRA in a batch whose samples have adapters of their own."""

from collections.abc import Sequence
from numbers import Integral
from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.autograd import function
from delora_kernels.autograd.lora_by_sample import MixedLinear
from delora_kernels.call import MixedCall, MixedOptions
from delora_kernels.functional import common

_NAME = "lora_linear_by_sample"

_SHORT = 32
"""Rows of a segment below which samples of one adapter are brought together: a copy of few rows
costs less than more, smaller products.
"""


def lora_linear_by_sample(
    x: Tensor,
    weight: Tensor,
    A: Sequence[Tensor],
    B: Sequence[Tensor],
    adapters: Sequence[int | None],
    scale: float | Sequence[float] = 1.0,
    bias: Tensor | None = None,
) -> Tensor:
    """Apply a frozen linear with each sample's own low-rank update.

        y_b = x_b Wᵀ + scale_i · x_b A_iᵀ B_iᵀ + bias,   i = adapters[b]

    One frozen GEMM for the whole batch; the rank terms by segments, samples of one adapter that
    stand together, in place. An adapter that no sample has costs nothing and gets no gradient.

    Args:
        x: Input, `[batch, ..., K]`.
        weight: Frozen weight W, `[N, K]`; gets a gradient only if it requires one.
        A: `[r_i, K]` each.
        B: `[N, r_i]` each.
        adapters: For each sample the place of its adapter in A and B, or None: the frozen linear
            alone.
        scale: Factor of each update, or one for all.
        bias: `[N]` or None.

    Returns:
        y, `[batch, ..., N]`, in weight's dtype (autocast's dtype under autocast).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), eq.
    3, sample by sample.
    """
    return _run(lora_by_sample_call(x, weight, A, B, adapters, scale, bias), x, weight)


def lora_linear_on_last(
    x: Tensor, weight: Tensor, A: Tensor, B: Tensor, last: Sequence[int], scale: float = 1.0, bias: Tensor | None = None
) -> Tensor:
    """Apply a frozen linear, with a low-rank update on each sample's last tokens.

    Args:
        x: Input, `[batch, ..., K]`.
        weight, scale, bias: As for `lora_linear_by_sample`.
        A, B: `[r, K]`, `[N, r]`; with a gradient, of zeros, where no token has the update too.
        last: For each sample the number of its tokens that have the update, from 0 to all.
    """
    call = lora_by_sample_call(x, weight, [A], [B], [0] * len(x), scale, bias, every=True)
    length, lengths = x.shape[1:-1].numel(), []
    for tokens in last:
        lengths += [length - min(tokens, length), min(tokens, length)]
    segments = call.options._replace(lengths=tuple(lengths), adapters=(None, 0) * len(last))
    if not lengths:  # a batch of no sample: one segment of no rows, for gradients of zeros
        segments = segments._replace(lengths=(0,), adapters=(0,))
    return _run(call._replace(options=segments), x, weight)


def _run(call: MixedCall, x: Tensor, weight: Any) -> Tensor:
    if common.exporting():
        y = common.plain_torch.run(call, x.shape)[0]
    else:
        y = function.run(MixedLinear, call, "eager", x.shape)[0]
    return y if isinstance(weight, Tensor) else weight.output(y, x)


def lora_by_sample_call(
    x: Any, weight: Any, A: Any, B: Any, adapters: Any, scale: Any = 1.0, bias: Any = None, *, every: bool = False
) -> MixedCall:
    """Check the arguments of `lora_linear_by_sample` and make its call; with `every`, adapters that
    no sample has are in it too, and get gradients of zeros.
    """
    _check(x, weight, bias, A, B, adapters)
    scales = _scales(scale, len(A))
    used = list(range(len(A))) if every else [i for i in dict.fromkeys(adapters) if i is not None]
    length = x.shape[1:-1].numel()
    runs = _runs(adapters)
    order = None
    if _are_brought_together(runs, len(used), length):
        together = [b for i in used for b, each in enumerate(adapters) if each == i]
        rows = torch.arange(x.shape[0] * length, device=x.device).view(x.shape[0], length).unbind()
        order = torch.cat([rows[b] for b in together])  # made where x is: of a list, the device would have to wait
        runs = _runs([adapters[b] for b in together])
    options = MixedOptions(
        _NAME,
        tuple([samples * length for _, samples in runs]),
        tuple([None if i is None else used.index(i) for i, _ in runs]),
        tuple([A[i].shape[0] for i in used]),
        tuple([scales[i] for i in used]),
        *common.dtypes(x, weight, *[A[i] for i in used], *[B[i] for i in used]),
    )
    A_all = _joined([A[i] for i in used], options.rank_dtype, x).view(-1, weight.shape[1])
    B_all = _joined([B[i].reshape(-1) for i in used], options.rank_dtype, x)
    return MixedCall(x, weight, bias, A_all, B_all, order, options)


def _check(x: Any, weight: Any, bias: Any, A: Any, B: Any, adapters: Any) -> None:
    for name, value in (("A", A), ("B", B), ("adapters", adapters)):
        if not isinstance(value, Sequence):
            remedy = "one entry for each adapter" if name != "adapters" else "one entry for each sample"
            raise checks.fail(TypeError, _NAME, name, "a list or tuple", type(value).__name__, f"pass {remedy}")
    checks.no_transforms(_NAME, (x, weight, bias, *A, *B), f"reference.{_NAME}")
    checks.base(_NAME, x, weight, bias)
    if x.dim() < 2:
        raise checks.fail(ValueError, _NAME, "x", "[batch, ..., K]", f"shape {list(x.shape)}", "pass samples, or one")
    if len(A) != len(B):
        raise checks.fail(ValueError, _NAME, "B", f"{len(A)} factors, as many as A", len(B), "pass one pair for each")
    for i, pair in enumerate(zip(A, B, strict=True)):
        if not checks.plainly_right(x, weight, bias, *pair):
            checks.factors(_NAME, x, weight, *pair, names=(f"A[{i}]", f"B[{i}]"))
    if len(adapters) != x.shape[0]:
        expected = f"{x.shape[0]} entries, one for each sample of x"
        raise checks.fail(ValueError, _NAME, "adapters", expected, len(adapters), "pass None for a sample without one")
    for each in adapters:
        if each is None or (type(each) is int and 0 <= each < len(A)):
            continue
        if isinstance(each, bool) or not isinstance(each, Integral) or int(each) not in range(len(A)):
            expected = f"places from 0 to {len(A) - 1}, or None"
            raise checks.fail(ValueError, _NAME, "adapters", expected, each, "pass the place of each sample's adapter")


def _scales(scale: Any, count: int) -> list[float]:
    if not isinstance(scale, Sequence):
        return [checks.number(_NAME, "scale", scale)] * count
    if len(scale) != count:
        expected = f"a number, or {count} of them, one for each adapter"
        raise checks.fail(ValueError, _NAME, "scale", expected, len(scale), "pass one for each adapter")
    return [checks.number(_NAME, "scale", each) for each in scale]


def _runs(adapters: Sequence[int | None]) -> list[tuple[int | None, int]]:
    """Adapter and number of samples that stand together."""
    runs: list[tuple[int | None, int]] = []
    for i in adapters:
        if runs and runs[-1][0] == i:
            runs[-1] = i, runs[-1][1] + 1
        else:
            runs.append((i, 1))
    return runs


def _are_brought_together(runs: Sequence[tuple[int | None, int]], used: int, length: int) -> bool:
    """Whether rows are copied, so that each adapter has one segment."""
    of_adapters = sum(i is not None for i, _ in runs)
    return of_adapters > used and length * sum(samples for _, samples in runs) < _SHORT * of_adapters


def _joined(factors: list[Tensor], dtype: torch.dtype, x: Tensor) -> Tensor:
    """Return the adapters' factors as one, in one dtype; of one adapter itself."""
    if not factors:
        return x.new_empty(0, dtype=dtype)
    if len(factors) == 1:
        return factors[0]
    with torch.autocast(x.device.type, enabled=False):  # its cat refuses the half precision that is not autocast's
        return torch.cat([factor if factor.dtype == dtype else factor.to(dtype) for factor in factors])
