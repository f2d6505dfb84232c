"""One number for how far a tensor is from what it should be."""

import math

import torch
from torch import Tensor


def relative_error(got: Tensor, expected: Tensor, dim: int | None = None) -> float:
    """Return the error of `got`, computed in float64.

        max |got − expected| / max |expected|

    Both maxima run over the whole tensor or, with `dim`, over each vector along it, and the worst
    vector counts: use it where vectors differ in size by orders of magnitude, as the gradients of
    clamped norms do. Where all that is expected is exactly 0, the error is max |got| itself. NaN
    and ±Inf are wanted in exactly the places where they are expected (the error is ∞ otherwise) and
    left out of both maxima there.

    Args:
        got: Any shape and float dtype.
        expected: The same shape.
        dim: Dimension of the vectors that stand alone; None: one vector.

    Returns:
        A number ≥ 0, possibly ∞, never NaN; 0 for empty tensors.

    Raises:
        ValueError: the shapes differ.
    """
    if got.shape != expected.shape:
        raise ValueError(f"relative_error: got has shape {list(got.shape)}, expected {list(expected.shape)}")
    if got.numel() == 0:
        return 0.0
    got, expected = got.detach().double().cpu(), expected.detach().double().cpu()
    difference, size = (got - expected).abs(), expected.abs()
    worst, largest = float(difference.max()), float(size.max())
    if not (math.isfinite(worst) and math.isfinite(largest)):
        finite = expected.isfinite()
        if not torch.equal(finite, got.isfinite()):
            return torch.inf
        if not torch.equal(got[~finite].nan_to_num(nan=0.0), expected[~finite].nan_to_num(nan=0.0)):
            return torch.inf
        difference, size = torch.where(finite, difference, 0.0), torch.where(finite, size, 0.0)
        worst, largest = float(difference.max()), float(size.max())
    if dim is None:
        return worst / (largest or 1.0)
    vectors, size = difference.amax(dim), size.amax(dim)
    return float((vectors / torch.where(size == 0, 1.0, size)).max())
