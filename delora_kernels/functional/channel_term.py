"""The adapter's part of a convolution's or an embedding's output, in plain torch: in place of the
product, its multiple and their sum one tensor of the output's size, or none where the frozen
layer's output is fresh and the term can be added into it. Beside a convolution's output that is
small, on a CPU, the product is one more.

    u = y + scale · B h;   with DoRA  c ⊙ (u − bias) + bias

y is the frozen layer's output, h that of A; c and bias broadcast along the channels. Autograd
differentiates torch's own operations, as often as asked.
"""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.functional import conv1d, conv2d, conv3d

from delora_kernels.checks import active_transform
from delora_kernels.functional.common import exporting

SMALL = 1 << 20
"""Elements of an output on a CPU that is small."""

_CONVOLUTION = (conv1d, conv2d, conv3d)


def add_channel_term(y: Tensor, h: Tensor, B: Tensor, scale: float, groups: int = 1, fresh: bool = False) -> Tensor:
    """Add y + scale · B h, rounded once where y and h are of one dtype (and y is not small).

    Args:
        y: `[batch, N, ...]`, contiguous or channels last: the result has its layout. Of another
            layout, and of channels last with groups, the sum is made in three steps.
        h: `[batch, r, ...]`.
        B: `[N, r / groups]`.
        scale: Factor of the term.
        groups: Of channels: each N / groups of y see the r / groups of h that stand at their place.
        fresh: Whether nobody else holds y and no backward pass reads it: it may be written to.
    """
    G = groups
    if _is_one_product(y, h, B):
        fresh = fresh and _may_write((y, h, B))
        if _is_small(y):
            product = _CONVOLUTION[h.dim() - 3](h, B.reshape(*B.shape, *(1,) * (h.dim() - 2)), groups=G)
            return y.add_(product, alpha=scale) if fresh else torch.add(y, product, alpha=scale)
        if y.is_contiguous():
            batch, N = y.shape[0], y.shape[1]
            rows, places = h.flatten(2), y.numel() // (batch * N)
            if G == 1 and batch == 1:
                made = _added(_shaped(y, (N, places)), B, rows[0], scale, fresh)
            elif G == 1:
                made = _added(_shaped(y, (batch, N, places)), B.expand(batch, -1, -1), rows, scale, fresh)
            else:
                batches = B.unflatten(0, (G, -1)).expand(batch, G, N // G, -1).flatten(0, 1)
                by_group = rows.unflatten(1, (G, -1)).flatten(0, 1)
                made = _added(_shaped(y, (batch * G, N // G, places)), batches, by_group, scale, fresh)
            return y if fresh and not torch.is_grad_enabled() else _shaped(made, y.shape)
        last = y.movedim(1, -1)
        if last.is_contiguous() and G == 1:
            rows = h.movedim(1, -1).flatten(0, -2)
            made = _added(_shaped(last, (rows.shape[0], -1)), rows, B.t(), scale, fresh)
            if torch.is_grad_enabled():
                return _shaped(made, last.shape).movedim(-1, 1)
            return y if fresh else _shaped(made, last.shape).movedim(-1, 1).clone()
    by_group = h.flatten(2).unflatten(1, (G, -1))
    term = torch.matmul(B.unflatten(0, (G, -1)), by_group).flatten(1, 2).unflatten(2, y.shape[2:])
    return y + term * scale


def _is_small(y: Tensor) -> bool:
    """Whether it takes longer to fetch a GEMM's code into cache than to write y once more: the
    product is then made by the library that has just made y. A traced program knows no sizes.
    """
    if torch.compiler.is_compiling() or exporting():
        return False
    return y.is_cpu and y.numel() <= SMALL and y.dtype in (torch.float32, torch.float64)


def add_row_term(y: Tensor, h: Tensor, B: Tensor, scale: float, fresh: bool = False) -> Tensor:
    """Add y + scale · h Bᵀ, as `add_channel_term`, of y `[..., N]` and h `[..., r]`."""
    if y.dim() > 1 and y.is_contiguous() and _is_one_product(y, h, B):
        fresh = fresh and _may_write((y, h, B))
        made = _added(_shaped(y, (-1, y.shape[-1])), h.flatten(0, -2), B.t(), scale, fresh)
        return y if fresh and not torch.is_grad_enabled() else _shaped(made, y.shape)
    return y + torch.matmul(h, B.t()) * scale


def _added(y: Tensor, left: Tensor, right: Tensor, scale: float, fresh: bool) -> Tensor:
    """Compute y + scale · left right of matrices, or of batches of them; into y if it is fresh."""
    if fresh:  # under autocast, which leaves what is written in place alone, the factors follow y
        left, right = left.to(y.dtype), right.to(y.dtype)
        return (y.addmm_ if y.dim() == 2 else y.baddbmm_)(left, right, alpha=scale)
    return (torch.addmm if y.dim() == 2 else torch.baddbmm)(y, left, right, alpha=scale)


def _shaped(made: Tensor, shape: Sequence[int]) -> Tensor:
    """Return a tensor in another shape and not as a view of it: into a view that was made without
    gradients nothing that requires them can be written, and what is written into one that was made
    with them copies its gradient.
    """
    shaped: Tensor = torch.ops.aten._unsafe_view(made, shape)
    return shaped


def _may_write(tensors: Sequence[Tensor]) -> bool:
    """Whether torch is in no state that forbids to write into a tensor: a compiler would be told of
    a write through what is no view, and transforms batch some of the tensors and not others.
    """
    return not (torch.compiler.is_compiling() or exporting() or active_transform(tensors) is not None)


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
    return _rescaled(u, along_channels(c, u), None if bias is None else along_channels(bias, u))


def along_channels(values: Tensor, u: Tensor) -> Tensor:
    """Return `[N]` in a shape that broadcasts along the channels of u `[batch, N, ...]`."""
    return values.view(-1, *(1,) * (u.dim() - 2))


def rescale_rows(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    """Compute the same of u `[..., N]`."""
    return _rescaled(u, c, bias)


def _rescaled(u: Tensor, c: Tensor, bias: Tensor | None) -> Tensor:
    return u * c if bias is None else torch.addcmul((1 - c) * bias, u, c)
