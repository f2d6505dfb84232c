"""The token-sized stages in plain torch: project, expand and their gradients, DoRA's row norm.

The rank-R term goes into the frozen GEMM's output in place (addmm_), so nothing else of size [T, N]
or [T, K] is written. Wherever a tensor must be seen in a wider dtype (DoRA's column scale, float32
factors on a bfloat16 base), rows are taken in chunks that stay in cache: a float32 copy of x, y, dy
or W never exists.
"""

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels.backends.dropout import KeepMask, mask_groups, times_mask
from delora_kernels.backends.eager.chunks import chunks_in, is_one_chunk, row_chunks
from delora_kernels.backends.eager.thin_products import by_columns, is_thin, product, token_product
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaled, Rescaling, TermGradients


def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Take the direct form, ‖W + scale · B̂Â‖ by rows, a chunk of rows at a time, of one expert
    after the other: no cancellation, no BA.
    """
    acc = accumulate_dtype(weight.dtype)
    if weight.dim() == 3:
        norm = weight.new_empty(weight.shape[:2], dtype=acc)
        for own, W, A, B in zip(norm, weight, A_hat, B_hat, strict=True):
            own.copy_(updated_norm(W, A.to(acc), B.to(acc), scale))
    else:
        norm = updated_norm(weight, A_hat.to(acc), B_hat.to(acc), scale)
    c = norm.new_empty(0) if magnitude is None else quotient(magnitude.to(acc), norm)
    return norm, c, (_scaled(weight, c[:, None]) if scaled else weight.new_empty(0))


def updated_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + scale · BA‖ [N] by rows, in the factors' dtype."""
    if is_one_chunk(A.dtype, weight):
        return torch.linalg.vector_norm(torch.addmm(weight, B, A, alpha=scale), dim=1)
    norm = A.new_empty(weight.shape[0])
    for rows, chunk in chunks_in(A.dtype, weight):
        updated = torch.addmm(chunk, B[rows], A, alpha=scale)
        torch.linalg.vector_norm(updated, dim=1, out=norm[rows])
    return norm


def quotient(numerator: Tensor, denominator: Tensor) -> Tensor:
    """numerator / denominator; 0 where the denominator is 0: no direction to scale."""
    return torch.div(numerator, denominator).masked_fill_(denominator == 0, 0)


def wants_scaled(x: Tensor, weight: Tensor) -> bool:
    """Whether `expand` is faster with row_norm's c ⊙ W: here never."""
    return False


def project(x: Tensor, A_hat: Tensor, masks: Masks) -> Tensor:
    """One GEMM, or where the factors are wider or an element drops, one for each chunk of rows and
    mask.
    """
    if x.dtype == A_hat.dtype and masks.seed is None:
        return torch.mm(x, A_hat.t())
    h = A_hat.new_empty((x.shape[0], A_hat.shape[0]))
    for group in mask_groups(A_hat.shape[0], masks):
        mask, right, out = group.mask(x.shape[1]), A_hat[group.columns].t(), h[:, group.columns]
        if mask is None and x.dtype == A_hat.dtype:
            torch.mm(x, right, out=out)
            continue
        for rows, chunk in chunks_in(A_hat.dtype, x):
            torch.mm(chunk if mask is None else mask.drop(chunk, rows), right, out=out[rows])
        out.div_(1 - group.dropout_p)
    return h


def expand(
    x: Tensor, weight: Tensor, bias: Tensor | None, term: RankTerm, rescaling: Rescaling
) -> tuple[Tensor, Tensor]:
    """Run the frozen GEMM and put the rank-R term on top; DoRA scales both in float32 chunks, and
    what it keeps is x Wᵀ.
    """
    nothing, (h, B_hat, scale), (c, scaled, keep, dropout_p, seed) = x.new_empty(0), term, rescaling
    if c is not None and scaled is not None:
        weight, B_hat, c = scaled, (B_hat * c[:, None]).to(B_hat.dtype), None
    if c is None:
        y = linear(x, weight, None if bias is None else bias.to(x.dtype))
        return add_rank_term(y, h, B_hat.t(), scale), nothing
    base = linear(x if seed is None else _drop(x, dropout_p, seed), weight)
    y = torch.empty_like(base) if keep else base
    undropped = None if seed is None else linear(x, weight)
    rescale(base, h.to(c.dtype), B_hat.to(c.dtype), scale, c, bias, y, undropped)
    return y, (base if keep else nothing)


def rescale(
    base: Tensor,
    h: Tensor,
    B_hat: Tensor,
    scale: float,
    c: Tensor,
    bias: Tensor | None,
    y: Tensor,
    undropped: Tensor | None = None,
) -> None:
    """Write y = c ⊙ (base + scale · h B̂ᵀ) + bias, computed in c's dtype a chunk of rows at a time.

    y may be base: it is c ⊙ base that is written first, and the rank term, of c ⊙ B̂, is added where
    that stands. Of an x that was dropped, `undropped` − base is added too: (x − drop(x)) Wᵀ.
    """
    scaled_B = B_hat.t() * c
    if undropped is None and is_one_chunk(c.dtype, base):
        torch.mul(base, c, out=y).addmm_(h, scaled_B, alpha=scale)
        if bias is not None:
            y += bias
        return
    for rows, chunk in chunks_in(c.dtype, base):
        out = y[rows] if y.dtype == c.dtype and undropped is None else None
        total = torch.mul(chunk, c, out=out).addmm_(h[rows], scaled_B, alpha=scale)
        if undropped is not None:
            total += undropped[rows].to(c.dtype) - chunk
        if bias is not None:
            total += bias
        if out is None:
            y[rows] = total


_IN_CACHE = 3 << 16
"""Elements of the products that `token_dots` adds up: 768 KiB in float32, in the caches of cores.
"""


def token_dots(dy: Tensor, kept: Tensor) -> Tensor:
    """Σ_t dy ⊙ kept [N] (acc), a chunk of rows at a time, so that the products stay in cache: of
    one dtype added up in the first chunk's, whose rows are summed once.
    """
    acc = accumulate_dtype(dy.dtype)
    if is_one_chunk(acc, dy):
        return (dy * kept).sum(0)
    if dy.is_cpu and dy.dtype == kept.dtype == acc:
        step = max(1, _IN_CACHE // dy.shape[1])
        products = dy[:step] * kept[:step]
        for start in range(step, len(dy), step):
            more = dy[start : start + step]
            products[: len(more)].addcmul_(more, kept[start : start + step])
        return products.sum(0)
    dots = dy.new_zeros(dy.shape[1], dtype=acc)
    for rows, chunk in chunks_in(acc, dy):
        dots += (chunk * kept[rows].to(acc)).sum(0)
    return dots


def add_rank_term(out: Tensor, left: Tensor, right: Tensor, scale: float) -> Tensor:
    """out += scale · left right, rounded once."""
    left, right = _operands(left, right, out.dtype)
    if left.dtype == out.dtype:
        return out.addmm_(left, right, alpha=scale)
    for rows, chunk in chunks_in(left.dtype, out):
        out[rows] = torch.addmm(chunk, left[rows], right, alpha=scale)
    return out


def _operands(left: Tensor, right: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """left and right as GEMM operands for a result in `dtype`.

    float32 factors of a bfloat16 result become high and low halves: one bfloat16 GEMM of rank 3R,
    which sums their products in float32, in place of a float32 tensor of the result's size.
    """
    if left.dtype != torch.float32 or dtype != torch.bfloat16:
        return left, right
    (left_high, left_low), (right_high, right_low) = _halves(left, dtype), _halves(right, dtype)
    return torch.cat([left_high, left_low, left_high], dim=1), torch.cat([right_high, right_high, right_low])


def _halves(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Two tensors in `dtype` whose exact sum is close to `wide`."""
    high = wide.to(dtype)
    return high, torch.where(high.isfinite(), wide - high, torch.zeros_like(wide)).to(dtype)


def _drop(x: Tensor, dropout_p: float, seed: Tensor) -> Tensor:
    dropped, mask = torch.empty_like(x), KeepMask(x.shape[1], dropout_p, seed)
    for rows in row_chunks(x):
        torch.div(mask.drop(x[rows], rows), 1 - dropout_p, out=dropped[rows])
    return dropped


def expand_backward(
    dy: Tensor, term: TermGradients, rescaled: Rescaled, need_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Two thin GEMMs on dy, and for DoRA its products with what was kept, summed in float32."""
    acc, (c, kept, kept_is_y, divisor) = accumulate_dtype(dy.dtype), rescaled
    dv, dB_hat = rank_gradients(dy, term, c)
    dm = dy.new_empty(0, dtype=acc)
    if kept is not None and divisor is not None:
        dm = token_dots(dy, kept)
        if not kept_is_y and term.B_hat is not None:  # kept x Wᵀ: Σ_t dy ⊙ (scale · h B̂ᵀ) is in dB̂ already
            dm += (dB_hat * term.B_hat).sum(1)
        dm = quotient(dm, divisor.to(acc))
    if c is not None and term.h is not None:
        dB_hat *= c[:, None]
    dy_sum = torch.sum(dy, 0, dtype=acc) if need_bias else dy.new_empty(0, dtype=acc)
    return dv, dB_hat, dm, dy_sum


def rank_gradients(dy: Tensor, term: TermGradients, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy (c ⊙ B̂) [T, R] and scale · dyᵀ h [N, R] (acc), each empty without its factor."""
    acc, (h, B_hat, scale) = accumulate_dtype(dy.dtype), term
    scaled_B = B_hat if c is None or B_hat is None else B_hat * c[:, None]
    small = B_hat if h is None else h
    if small is not None and small.dtype != dy.dtype:
        return _wide_rank_gradients(dy, h, scaled_B, scale)
    if scaled_B is None:
        dv = dy.new_empty(0)
    elif scaled_B.dtype == dy.dtype:
        dv = torch.mm(dy, by_columns(scaled_B, dy))
    else:
        high, low = _halves(scaled_B, dy.dtype)
        dv = torch.mm(dy, low).addmm_(dy, high)
    if h is None:
        return dv, dy.new_empty(0, dtype=acc)
    return dv, token_product(dy, h, scale).to(acc)


def _wide_rank_gradients(dy: Tensor, h: Tensor | None, scaled_B: Tensor | None, scale: float) -> tuple[Tensor, Tensor]:
    """Return the same where factors are wider than dy, a chunk of rows at a time."""
    nothing = dy.new_empty(0)
    dv = nothing if scaled_B is None else scaled_B.new_empty((dy.shape[0], scaled_B.shape[1]))
    right = None if scaled_B is None else by_columns(scaled_B, dy)
    R = 0 if h is None else h.shape[1]
    dB_hat = nothing.to(torch.float32) if h is None else h.new_zeros((dy.shape[1], R))
    if h is not None and is_thin(dy, h):
        dB_hat = dB_hat.view(R, -1).t()
    for rows, chunk in chunks_in(dv.dtype if h is None else h.dtype, dy):
        if right is not None:
            torch.mm(chunk, right, out=dv[rows])
        if h is not None:
            dB_hat.addmm_(chunk.t(), h[rows], alpha=scale)
    return dv, dB_hat.contiguous()


def input_backward(dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks) -> tuple[Tensor, Tensor]:
    """dÂ, then dx: what the thin GEMM took is free again when the token-sized result is made.

    With dropout the frozen GEMM comes first, and each chunk of rows gets its rank-R term beside its
    part of dÂ.
    """
    (weight, c, two_term), (dv, A_hat, x, r, scale) = frozen, branch
    if masks.seed is None:
        if x is None:
            dA_hat = dv.new_empty(0, dtype=accumulate_dtype(dv.dtype))
        else:
            dA_hat = factor_grad(dv if r == dv.shape[1] else dv[:, :r], x, scale)
        if weight is None or A_hat is None:
            return dy.new_empty(0), dA_hat
        return add_rank_term(scaled_gemm(dy, weight, c), dv, A_hat, scale), dA_hat
    if weight is None or A_hat is None:
        return dy.new_empty(0), _masked_backward(None, branch._replace(A_hat=None), masks)
    if not two_term or c is None:
        dx = scaled_gemm(dy, weight, c)
        return dx, _masked_backward(dx, branch, masks)
    inverse = 1 / (1 - masks.dropout_p[0])
    dx = add_rank_term(scaled_gemm(dy, weight, (c - 1) * inverse), dv, A_hat, scale * inverse)
    dA_hat = _masked_backward(dx, branch._replace(A_hat=None), masks)
    return dx.addmm_(dy, weight), dA_hat


def factor_grad(dv: Tensor, x: Tensor, scale: float) -> Tensor:
    """dÂ: one GEMM, or one for each chunk of rows, summed in float32."""
    acc = accumulate_dtype(dv.dtype)
    if x.dtype == dv.dtype:
        return product(dv.t(), x, scale).to(acc)
    dA_hat = dv.new_zeros((dv.shape[1], x.shape[1]), dtype=acc)
    for rows, chunk in chunks_in(acc, x):
        dA_hat.addmm_(dv[rows].to(acc).t(), chunk, alpha=scale)
    return dA_hat


def _masked_backward(dx: Tensor | None, branch: Branch, masks: Masks) -> Tensor:
    """dÂ; adds each mask's part of the rank-R term to dx, or without A_hat, where dx has it, drops
    elements of dx.

    A mask is made once, a chunk of rows at a time.
    """
    dv, A_hat, x, r, scale = branch
    acc = accumulate_dtype(dv.dtype)
    dA_hat = dv.new_empty(0, dtype=acc) if x is None else dv.new_zeros((r, x.shape[1]), dtype=acc)
    tokens = x if dx is None else dx
    if tokens is None:
        return dA_hat
    for group in mask_groups(dv.shape[1], masks):
        columns, trained = group.columns, slice(group.columns.start, min(group.columns.stop, r))
        factor, mask = scale / (1 - group.dropout_p), group.mask(tokens.shape[1])
        if mask is None:
            if x is not None:
                dA_hat[trained] = factor_grad(dv[:, trained], x, factor)
            if dx is not None and A_hat is not None:
                add_rank_term(dx, dv[:, columns], A_hat[columns], factor)
            continue
        for rows in row_chunks(tokens):
            keep = mask(rows)
            if x is not None:
                dropped = times_mask(x[rows].to(acc), keep)
                dA_hat[trained].addmm_(dv[rows, trained].to(acc).t(), dropped, alpha=factor)
            if dx is None:
                continue
            if A_hat is None:
                times_mask(dx[rows], keep, out=dx[rows])
                continue
            term = torch.mm(dv[rows, columns], A_hat[columns])
            total = dx[rows].to(dv.dtype)  # where that is its dtype, a view
            total.add_(times_mask(term, keep, out=term), alpha=factor)
            if dx.dtype != total.dtype:
                dx[rows] = total
    return dA_hat


def scaled_gemm(dy: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """(dy ⊙ c) W with one transient."""
    return torch.mm(*scaled_pair(dy, weight, c))


def scaled_pair(dy: Tensor, weight: Tensor, c: Tensor | None) -> tuple[Tensor, Tensor]:
    """dy and W, c on the smaller of them."""
    if c is None:
        return dy, weight
    if dy.shape[0] <= weight.shape[1]:
        return _scaled(dy, c), weight
    return dy, _scaled(weight, c[:, None])


def _scaled(matrix: Tensor, factor: Tensor) -> Tensor:
    """matrix ⊙ factor, rounded once from factor's dtype; factor is a row [columns] or a column
    [rows, 1].
    """
    if matrix.dtype == factor.dtype:
        return matrix * factor
    scaled = torch.empty_like(matrix, memory_format=torch.contiguous_format)
    for rows, chunk in chunks_in(factor.dtype, matrix):
        scaled[rows] = chunk * (factor[rows] if factor.dim() == 2 else factor)
    return scaled


def weight_grad(dy: Tensor, x: Tensor, c: Tensor | None, dropout_p: float, seed: Tensor | None) -> Tensor:
    """One GEMM; two for PEFT's two-term DoRA."""
    dW = torch.mm(dy.t(), x)
    if c is None:
        return dW
    if seed is None:
        return _scaled(dW, c[:, None])
    return dW.add_(_scaled(torch.mm(dy.t(), _drop(x, dropout_p, seed)), (c - 1)[:, None]))


def dropout_mask(T: int, K: int, dropout_p: float, seed: Tensor) -> Tensor:
    """Make the whole mask at once; the other ops make theirs a chunk at a time."""
    return KeepMask(K, dropout_p, seed)(slice(0, T))
