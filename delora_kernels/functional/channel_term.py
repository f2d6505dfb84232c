"""The adapter's part of a convolution's or an embedding's output, in plain torch: one tensor of the
output's size in place of the product, its multiple and their sum.

    u = y + scale · B h;   with DoRA  c ⊙ (u − bias) + bias

y is the frozen layer's output, h that of A; c and bias broadcast along the channels. Autograd
differentiates torch's own operations, as often as asked.
"""

import torch
from torch import Tensor


def add_channel_term(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """Add y + scale · B h, rounded once where y and h are of one dtype.

    Args:
        y: `[batch, N, ...]`, contiguous or channels last: the result has its layout. Of another
            layout the sum is made in three steps.
        h: `[batch, r, ...]`.
        B: `[N, r]`.
        scale: Factor of the term.
    """
    if _is_one_product(y, h, B):
        if y.is_contiguous():
            batches = B.expand(y.shape[0], *B.shape)
            return _shaped(torch.baddbmm(y.flatten(2), batches, h.flatten(2), alpha=scale), y)
        last = y.movedim(1, -1)
        if last.is_contiguous():
            rows = torch.addmm(last.flatten(0, -2), h.movedim(1, -1).flatten(0, -2), B.t(), alpha=scale)
            made = _shaped(rows, last).movedim(-1, 1)
            return made if torch.is_grad_enabled() else made.clone()
    term = torch.matmul(B, h.flatten(2)).unflatten(2, y.shape[2:])
    return y + term * scale


def add_row_term(y: Tensor, h: Tensor, B: Tensor, scale: float) -> Tensor:
    """Add y + scale · h Bᵀ, as `add_channel_term`, of y `[..., N]` and h `[..., r]`."""
    if y.dim() > 1 and _is_one_product(y, h, B):
        return _shaped(torch.addmm(y.flatten(0, -2), h.flatten(0, -2), B.t(), alpha=scale), y)
    return y + torch.matmul(h, B.t()) * scale


def _shaped(made: Tensor, like: Tensor) -> Tensor:
    """Return a product in another shape and not as a view of it: into a view that was made without
    gradients nothing that requires them can be written.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(made, like.shape)
    return shaped


def _is_one_product(y: Tensor, h: Tensor, B: Tensor) -> bool:
    """Whether y + scale · B h is one operation that rounds once, in y's dtype."""
    if torch.is_autocast_enabled(y.device.type) and torch.float64 not in (h.dtype, B.dtype):
        return y.dtype == torch.get_autocast_dtype(y.device.type) and y.numel() > 0
    return y.dtype == h.dtype == B.dtype and y.numel() > 0


def rescale_channels(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Compute c ⊙ (u − bias) + bias, as c ⊙ u + (1 − c) ⊙ bias.

    Args:
        u: `[batch, N, ...]`.
        c: `[N]`.
        bias: `[N]` or None.
    """
    shape = (-1, *(1,) * (u.dim() - 2))
    return _rescaled(u, c.view(shape), None if bias is None else bias.view(shape))


def rescale_rows(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the same of u `[..., N]`."""
    return _rescaled(u, c, bias)


def _rescaled(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return u * c if bias is None else torch.addcmul((1 - c) * bias, u, c)
