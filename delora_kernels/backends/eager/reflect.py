"""ETHER's block reflections in plain torch: a rank-1 (ETHER+: rank-2) update of every block, rows
in chunks.

With the blocks' directions S [blocks, m, D], m = 1 or 2, and their signs c (−2, or −1 and +1):

    x' = x + c ⊙ (x Sᵀ) S        dx = dy + c ⊙ (dy Sᵀ) S        dS = c ⊙ ((x Sᵀ)ᵀ dy + (dy Sᵀ)ᵀ x)
"""

import torch
from torch import Tensor

from delora_kernels.backends.eager.chunks import chunks_in
from delora_kernels.dtypes import accumulate_dtype

_GROUP = 16
"""Rows whose products are summed by a GEMM."""


def reflect(x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None) -> Tensor:
    """Each chunk is read once from memory, then reflected in cache."""
    S, signs, _ = _directions(x, u, v)
    y = x.new_empty(x.shape)
    for rows, chunk in chunks_in(S.dtype, x):
        _update(y[rows], chunk, _along(chunk, S), S, signs, bias, scratch=x.dtype != S.dtype)
    return y


def reflect_backward(
    dy: Tensor, x: Tensor, u: Tensor, v: Tensor | None, need_dx: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """dS is summed chunk by chunk, in order; then each direction loses the part along itself."""
    S, signs, length = _directions(x, u, v)
    dx, dS = dy.new_empty(dy.shape if need_dx else 0), torch.zeros_like(S)
    for (rows, dy_chunk), (_, x_chunk) in zip(chunks_in(S.dtype, dy), chunks_in(S.dtype, x), strict=True):
        along_dy = _along(dy_chunk, S)
        dS += _token_sum(_along(x_chunk, S), _by_block(dy_chunk, S)) + _token_sum(along_dy, _by_block(x_chunk, S))
        if need_dx:
            _update(dx[rows], dy_chunk, along_dy, S, signs, None, scratch=dy.dtype != S.dtype)
    dS *= signs[:, None]
    dS = (dS - (dS * S).sum(2, keepdim=True) * S) / length
    return dx, dS[:, 0].clone(), dS.new_empty(0) if v is None else dS[:, 1].clone()


def _directions(x: Tensor, u: Tensor, v: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """S, c [m], and the lengths [blocks, m, 1] with ∞ for 0: what is divided by them is 0."""
    acc = accumulate_dtype(torch.promote_types(x.dtype, u.dtype))
    S = torch.stack([u] if v is None else [u, v], dim=1).to(acc)
    length = torch.linalg.vector_norm(S, dim=2, keepdim=True)
    length = length.masked_fill(length == 0, torch.inf)
    return S / length, S.new_tensor([-2.0] if v is None else [-1.0, 1.0]), length


def _by_block(chunk: Tensor, S: Tensor) -> Tensor:
    """[t, C] as [blocks, t, D], a view."""
    return chunk.unflatten(1, (S.shape[0], S.shape[2])).transpose(0, 1)


def _along(chunk: Tensor, S: Tensor) -> Tensor:
    """x Sᵀ, [blocks, t, m]."""
    return torch.bmm(_by_block(chunk, S), S.transpose(1, 2))


def _token_sum(along: Tensor, blocks: Tensor) -> Tensor:
    """Σ_t along [n, t, m] blocks [n, t, D] → [n, m, D], by groups of rows, whose sums torch adds in
    pairs.

    A GEMM this small adds one row after the other, and rounds each time.
    """
    whole = along.shape[1] // _GROUP * _GROUP
    left, right = (each[:, :whole].unflatten(1, (-1, _GROUP)) for each in (along, blocks))
    return (left.mT @ right).sum(1) + along[:, whole:].mT @ blocks[:, whole:]


def _update(
    out: Tensor, chunk: Tensor, along: Tensor, S: Tensor, signs: Tensor, bias: Tensor | None, scratch: bool
) -> None:
    """out = chunk + c ⊙ along · S + bias; `scratch`: the chunk may be overwritten, and has to be
    cast.
    """
    target = chunk if scratch else out
    torch.baddbmm(_by_block(chunk, S), along * signs, S, out=_by_block(target, S))
    if bias is not None:
        target += bias
    if scratch:
        out.copy_(target)
