"""The eager backend: every op in plain torch, on every device; the default on a CPU.

Two habits keep it lean. The rank-R term goes into the frozen GEMM's output in place (addmm_), so nothing else of size
[T, N] or [T, K] is written. And wherever a tensor must be seen in a wider dtype
(DoRA's column scale, fp32 factors on a bf16 base), rows are taken in chunks that stay in cache: a float32 copy of x,
y, dy or W never exists.

Shapes, dtypes and formulas are those of `ops.py`.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.hashed_dropout import keep_mask
from delora_kernels.call import Call
from delora_kernels.ops import accumulate_dtype

_CHUNK_ELEMENTS = 1 << 18
"""Elements of one chunk: 1 MiB in float32, small enough for a core's cache."""


def supports(call: Call) -> str | None:
    """None: plain torch takes every call."""
    return None


def _row_chunks(rows: int, columns: int) -> Iterator[slice]:
    step = max(1, _CHUNK_ELEMENTS // max(1, columns))
    return (slice(start, min(start + step, rows)) for start in range(0, rows, step))


def _chunks_in(dtype: torch.dtype, matrix: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Row chunks of `matrix` in `dtype`: views where that is its dtype, else one scratch chunk filled again and again."""
    scratch = None
    for rows in _row_chunks(*matrix.shape):
        chunk = matrix[rows]
        if matrix.dtype != dtype:
            scratch = torch.empty(chunk.shape, dtype=dtype, device=matrix.device) if scratch is None else scratch
            chunk = scratch[: chunk.shape[0]].copy_(chunk)
        yield rows, chunk


def fold(A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor, frozen_A: Tensor | None, frozen_B: Tensor | None,
         frozen_lam: Tensor | None, eps: float, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    a, b = _norms(A, B)
    A_hat, B_hat = _folded(A, B, a, b, lam, weight_norm, eps)
    if frozen_A is not None and frozen_B is not None:
        a0, b0 = _norms(frozen_A, frozen_B)
        A0_hat, B0_hat = _folded(frozen_A, frozen_B, a0, b0, lam if frozen_lam is None else frozen_lam, weight_norm, eps)
        A_hat, B_hat = torch.cat([A_hat, A0_hat]), torch.cat([B_hat, B0_hat.neg_()], dim=1)
        a, b = torch.cat([a, a0]), torch.cat([b, b0])
    return A_hat.to(dtype), B_hat.to(dtype), a, b


def _norms(A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
    acc = accumulate_dtype(A.dtype)
    return torch.linalg.vector_norm(A.to(acc), dim=1), torch.linalg.vector_norm(B.to(acc), dim=0)


def _folded(A: Tensor, B: Tensor, a: Tensor, b: Tensor, lam: Tensor, weight_norm: Tensor,
            eps: float) -> tuple[Tensor, Tensor]:  # fmt: skip
    A_hat = (A * _reciprocal(a, eps)[:, None]).mul_(weight_norm)
    return A_hat, B * (lam.to(b.dtype).reshape(()) / A.shape[0] * _reciprocal(b, eps))


def _reciprocal(norm: Tensor, eps: float) -> Tensor:
    """1 / max(norm, eps); 0 for a norm of 0 without a clamp: a vector of length 0 has no direction."""
    clamped = norm.clamp(min=eps)
    return torch.where(clamped > 0, 1 / clamped, torch.zeros_like(norm))


def fold_backward(dA_hat: Tensor | None, dB_hat: Tensor | None, A: Tensor, B: Tensor, lam: Tensor,
                  weight_norm: Tensor, frozen_B: Tensor | None, a: Tensor, b: Tensor,
                  eps: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    r = A.shape[0]
    dA, dB, dlam = A.new_empty(0), B.new_empty(0), b.new_empty(0)
    if dA_hat is not None:
        dA, _ = _normalise_backward(dA_hat * weight_norm, A, a[:r], eps, dim=1)
    if dB_hat is not None:
        dB, along = _normalise_backward(dB_hat[:, :r], B, b[:r], eps, dim=0)
        dB *= lam.to(b.dtype) / r
        dlam = along.sum() / r
        if frozen_B is not None:
            dlam -= (dB_hat[:, r:] * frozen_B * _reciprocal(b[r:], eps)).sum() / r
    return dA.to(A.dtype), dB.to(B.dtype), dlam.reshape(-1)


def _normalise_backward(grad: Tensor, factor: Tensor, norm: Tensor, eps: float, dim: int) -> tuple[Tensor, Tensor]:
    """Gradient of factor / max(norm, eps) along `dim`, and ⟨grad, that unit vector⟩.

    Without an active clamp the part of the gradient along the factor drops out.
    """
    inverse = _reciprocal(norm, eps)
    along = (grad * factor).sum(dim).mul_(inverse)
    remaining = (along * inverse * inverse * (norm >= eps)).unsqueeze(dim)
    return (grad * inverse.unsqueeze(dim)).addcmul_(factor, remaining, value=-1), along


def row_norm(weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float) -> Tensor:
    acc = accumulate_dtype(weight.dtype)
    A, B = A_hat.to(acc), B_hat.to(acc)
    norm = weight.new_empty(weight.shape[0], dtype=acc)
    for rows, chunk in _chunks_in(acc, weight):
        updated = torch.addmm(chunk, B[rows], A, alpha=scale)
        torch.linalg.vector_norm(updated, dim=1, out=norm[rows])
    return norm


def project(x: Tensor, A_hat: Tensor, dropout_p: float, seed: Tensor | None) -> Tensor:
    if x.dtype == A_hat.dtype and seed is None:
        return torch.mm(x, A_hat.t())
    h = A_hat.new_empty((x.shape[0], A_hat.shape[0]))
    for rows, chunk in _chunks_in(A_hat.dtype, x):
        torch.mm(_dropped(chunk, rows, dropout_p, seed), A_hat.t(), out=h[rows])
    return h.div_(1 - dropout_p)


def _dropped(chunk: Tensor, rows: slice, dropout_p: float, seed: Tensor | None) -> Tensor:
    """Rows of x with the dropped elements zeroed, not yet divided by 1 − p."""
    return chunk if seed is None else chunk * keep_mask(rows, chunk.shape[1], dropout_p, seed)


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, h: Tensor, B_hat: Tensor, scale: float, c: Tensor | None,
           keep_u: bool, dropout_p: float, seed: Tensor | None) -> tuple[Tensor, Tensor]:  # fmt: skip
    nothing = x.new_empty(0)
    if c is None:
        y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        return _add_rank_term(y, h, B_hat.t(), scale), nothing
    u = _add_rank_term(linear(x if seed is None else _drop(x, dropout_p, seed), weight), h, B_hat.t(), scale)
    if seed is not None:  # y = (x Wᵀ + scale · h B̂ᵀ) + (c − 1) ⊙ u + bias
        y, c = _add_rank_term(linear(x, weight), h, B_hat.t(), scale), c - 1
    else:
        y = torch.empty_like(u) if keep_u else u
    for rows, chunk in _chunks_in(c.dtype, u):
        scaled = chunk * c
        if seed is not None:
            scaled += y[rows]
        y[rows] = scaled if bias is None else scaled.add_(bias)
    return y, (u if keep_u else nothing)


def _add_rank_term(out: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """out += scale · left right, rounded once.

    float32 factors of a bfloat16 result go in as high and low halves: one bfloat16 GEMM of rank 3R that sums their
    products in float32.
    """
    if left.dtype == torch.float32 and out.dtype == torch.bfloat16:
        (left_high, left_low), (right_high, right_low) = _halves(left), _halves(right)
        left = torch.cat([left_high, left_low, left_high], dim=1)
        right = torch.cat([right_high, right_high, right_low])
    if left.dtype == out.dtype:
        return out.addmm_(left, right, alpha=scale)
    for rows, chunk in _chunks_in(left.dtype, out):
        out[rows] = torch.addmm(chunk, left[rows], right, alpha=scale)
    return out


def _halves(wide: Tensor) -> tuple[Tensor, Tensor]:
    high = wide.to(torch.bfloat16)
    low = torch.where(high.isfinite(), wide - high, torch.zeros_like(wide))
    return high, low.to(torch.bfloat16)


def _drop(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    dropped = torch.empty_like(x)
    for rows in _row_chunks(*x.shape):
        torch.div(_dropped(x[rows], rows, dropout_p, seed), 1 - dropout_p, out=dropped[rows])
    return dropped


def expand_backward(dy: Tensor, h: Tensor | None, B_hat: Tensor | None, scale: float, c: Tensor | None,
                    u: Tensor | None, need_bias: bool) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    acc = accumulate_dtype(dy.dtype)
    if c is not None and B_hat is not None:
        B_hat = (B_hat * c[:, None]).to(B_hat.dtype)
    dv, dB_hat = _rank_gradients(dy, h, B_hat, acc)
    if h is not None:
        dB_hat *= scale if c is None else (scale * c)[:, None]
    dy_dot_u = dy.new_zeros(0 if u is None else dy.shape[1], dtype=acc)
    if u is not None:
        for rows, chunk in _chunks_in(acc, dy):
            dy_dot_u += (chunk * u[rows].to(acc)).sum(0)
    dy_sum = torch.sum(dy, 0, dtype=acc) if need_bias else dy.new_empty(0, dtype=acc)
    return dv, dB_hat, dy_dot_u, dy_sum


def _rank_gradients(dy: Tensor, h: Tensor | None, B_hat: Tensor | None, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    """dy B̂ [T, R] and dyᵀ h [N, R] (acc), each empty without its factor; dy is read in the factors' dtype."""
    nothing = dy.new_empty(0)
    rank_dtype = next((small.dtype for small in (B_hat, h) if small is not None), dy.dtype)
    if rank_dtype == dy.dtype:
        dv = nothing if B_hat is None else torch.mm(dy, B_hat)
        dB_hat = nothing.to(acc) if h is None else torch.mm(h.t(), dy).t().to(acc).contiguous()
        return dv, dB_hat
    dv = nothing if B_hat is None else B_hat.new_empty((dy.shape[0], B_hat.shape[1]))
    dB_hat = nothing.to(acc) if h is None else h.new_zeros((dy.shape[1], h.shape[1]))
    for rows, chunk in _chunks_in(rank_dtype, dy):
        if B_hat is not None:
            torch.mm(chunk, B_hat, out=dv[rows])
        if h is not None:
            dB_hat.addmm_(chunk.t(), h[rows])
    return dv, dB_hat


def input_grad(dy: Tensor, weight: Tensor, dv: Tensor, A_hat: Tensor, scale: float, c: Tensor | None,
               dropout_p: float, seed: Tensor | None, two_term: bool) -> Tensor:  # fmt: skip
    if seed is None:
        return _add_rank_term(_scaled_gemm(dy, weight, c), dv, A_hat, scale)
    K, scale = weight.shape[1], scale / (1 - dropout_p)
    if two_term and c is not None:
        dropped = _add_rank_term(_scaled_gemm(dy, weight, (c - 1) / (1 - dropout_p)), dv, A_hat, scale)
        for rows in _row_chunks(*dropped.shape):
            dropped[rows] *= keep_mask(rows, K, dropout_p, seed)
        return dropped.addmm_(dy, weight)
    dx = _scaled_gemm(dy, weight, c)
    for rows, chunk in _chunks_in(dv.dtype, dx):
        dx[rows] = torch.mm(dv[rows], A_hat).mul_(scale).mul_(keep_mask(rows, K, dropout_p, seed)).add_(chunk)
    return dx


def _scaled_gemm(dy: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """(dy ⊙ c) W with one transient, the smaller of dy ⊙ c and c ⊙ W."""
    if c is not None and dy.shape[0] <= weight.shape[1]:
        dy = _scaled(dy, c)
    elif c is not None:
        weight = _scaled(weight, c[:, None])
    return torch.mm(dy, weight)


def _scaled(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix ⊙ factor, multiplied in factor's dtype and rounded once; factor is a row [columns] or a column [rows, 1]."""
    scaled = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows, chunk in _chunks_in(factor.dtype, matrix):
        scaled[rows] = chunk * (factor[rows] if factor.dim() == 2 else factor)
    return scaled


def project_backward(dv: Tensor, x: Tensor, scale: float, dropout_p: float, seed: Tensor | None) -> Tensor:
    acc = accumulate_dtype(dv.dtype)
    if x.dtype == dv.dtype and seed is None:
        return torch.mm(dv.t(), x).to(acc).mul_(scale)
    dA_hat = dv.new_zeros((dv.shape[1], x.shape[1]), dtype=acc)
    for rows, chunk in _chunks_in(acc, x):
        dA_hat.addmm_(dv[rows].to(acc).t(), _dropped(chunk, rows, dropout_p, seed))
    return dA_hat.mul_(scale / (1 - dropout_p))


def weight_grad(dy: Tensor, x: Tensor, c: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    dW = torch.mm(dy.t(), x)
    if c is None:
        return dW
    if seed is None:
        return _scaled(dW, c[:, None])
    return dW.add_(_scaled(torch.mm(dy.t(), _drop(x, dropout_p, seed)), (c - 1)[:, None]))


def dropout_mask(T: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    return keep_mask(slice(0, T), K, dropout_p, seed)
