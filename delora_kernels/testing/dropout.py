"""What a dropout mask owes: the right rate, independent elements, independent seeds, the same bits
every time.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.testing.problem import Measurement

SIGMAS = 6.0
"""Limit of every frequency, in standard deviations: a right mask fails once in 5·10⁸ times."""


def dropout_masks(T: int, K: int, dropout_p: float | Sequence[float], seed: Tensor, backend: str) -> Tensor:
    """Return the elements that a backend keeps: bool `[T, K]` for a 0-d seed, `[S, T, K]` for the
    seeds `[S]` of S masks.
    """
    probabilities = [dropout_p] if isinstance(dropout_p, float) else dropout_p
    seeds = seed.reshape(-1)
    kept = [ops.dropout_mask(T, K, p, one, backend) for p, one in zip(probabilities, seeds, strict=True)]
    return torch.stack(kept).reshape(*seed.shape, T, K)


def measure_dropout_mask(
    T: int, K: int, *, backend: str, p: float = 0.2, device: str | torch.device = "cpu", seed: int = 0
) -> list[Measurement]:
    """Judge the op dropout_mask by frequencies; errors are in standard deviations of a fair coin's.

    Args:
        T: Rows.
        K: Columns.
        backend: Name of the backend.
        p: Probability of dropping an element.
        device: Where the mask lives.
        seed: Of the mask; seed + 1 is the other mask it is compared with.

    Returns:
        `rate`, agreement with the `next row`, the `next column` and the `next seed`, and `repeat`
        (0 or ∞).
    """
    first, again, other = (
        ops.dropout_mask(T, K, p, torch.tensor(s, dtype=torch.int64, device=device), backend)
        for s in (seed, seed, seed + 1)
    )
    note = "" if first.shape == (T, K) and first.dtype == torch.bool else f"{first.dtype} {list(first.shape)}"
    if note:
        return [Measurement("mask", torch.inf, 0.0, note=f"{note} instead of bool {[T, K]}")]
    agreement = p**2 + (1 - p) ** 2
    frequencies = {
        "rate": _sigmas(first, 1 - p),
        "next row": _sigmas(first[1:] == first[:-1], agreement),
        "next column": _sigmas(first[:, 1:] == first[:, :-1], agreement),
        "next seed": _sigmas(first == other, agreement),
    }
    measurements = [Measurement(what, error, SIGMAS) for what, error in frequencies.items()]
    return [*measurements, Measurement("repeat", 0.0 if torch.equal(first, again) else torch.inf, 0.0)]


def _sigmas(hits: Tensor, probability: float) -> float:
    """How many standard deviations the number of hits is from its mean, hits being independent."""
    n = max(1, hits.numel())
    return abs(float(hits.sum()) - n * probability) / (n * probability * (1 - probability)) ** 0.5
