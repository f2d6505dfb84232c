"""Every op of ops.py by its formula alone, whole matrices at a time: what problems.py compares the
backends with.

Signatures are those of the ops without `backend`, with the mask of kept elements (bool `[T, K]` or
None) in the place of every `seed`. Operands of different dtypes are multiplied in the wider
one; None stands for a result that was not asked for.
"""

import torch
from torch import Tensor

from delora_kernels.op_arguments import (
    Branch,
    ExpertFactors,
    Folded,
    Frozen,
    Gated,
    Gating,
    Masks,
    RankTerm,
    Rescaled,
    Rescaling,
    Start,
    Strength,
    TermGradients,
)

Results = tuple[Tensor | None, ...]
Two = tuple[Tensor, Tensor | None]


def fold(A: Tensor, B: Tensor, strength: Strength, start: Start, dtype: torch.dtype) -> Results:
    """Â = diag(1/max(a, eps)) A diag(n), B̂ = B diag(λ / (r max(b, eps))), a, b; the frozen pair
    behind, with −λ₀.
    """
    if strength.lam is None:
        return A.to(dtype), B.to(dtype), None, None
    A_hat, B_hat, a, b = _folded(A, B, strength, start)
    return A_hat.to(dtype), B_hat.to(dtype), a, b


def _folded(A: Tensor, B: Tensor, strength: Strength, start: Start) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    (lam, weight_norm, eps), (frozen_A, frozen_B, frozen_lam) = strength, start
    assert lam is not None
    assert weight_norm is not None
    pairs = [(A, B, lam)]
    if frozen_A is not None and frozen_B is not None:
        pairs.append((frozen_A, frozen_B, -(lam if frozen_lam is None else frozen_lam)))
    a, b = [A.norm(dim=1) for A, _, _ in pairs], [B.norm(dim=0) for _, B, _ in pairs]
    A_hat = [A / a.clamp(min=eps)[:, None] * weight_norm for (A, _, _), a in zip(pairs, a, strict=True)]
    B_hat = [B * (lam / len(A)) / b.clamp(min=eps) for (A, B, lam), b in zip(pairs, b, strict=True)]
    return torch.cat(A_hat), torch.cat(B_hat, dim=1), torch.cat(a), torch.cat(b)


def stack_factors(factors: ExpertFactors, dtype: torch.dtype) -> Results:
    """Stack [A; G; A⁰] and [B | −γ B⁰], expert by expert."""
    *firsts, B, frozen_B, residual = factors
    parts = [part for part in firsts if part is not None]
    columns = list(B)
    if frozen_B is not None and residual is not None:
        columns += [-factor * each for factor, each in zip(residual, frozen_B, strict=True)]
    return torch.cat(parts).to(dtype) if parts else None, torch.cat(columns, dim=1).to(dtype)


def fold_backward(dA_hat: Tensor | None, dB_hat: Tensor | None, folded: Folded, strength: Strength) -> Results:
    """Return the gradients that autograd finds for fold; its norms a and b are not needed for
    that.
    """
    r, frozen_B = len(folded.A), folded.frozen_B
    assert strength.lam is not None
    with torch.enable_grad():
        A, B, lam = (value.detach().clone().requires_grad_() for value in (folded.A, folded.B, strength.lam))
        frozen_A = None if frozen_B is None else A.new_ones(frozen_B.shape[1], A.shape[1])
        A_hat, B_hat, *_ = _folded(A, B, strength._replace(lam=lam), Start(frozen_A, frozen_B))
    dA = dB = dlam = None
    if dA_hat is not None:
        (dA,) = torch.autograd.grad(A_hat[:r], A, dA_hat.to(A.dtype))
    if dB_hat is not None:
        columns = B_hat.shape[1]  # a frozen pair with a λ₀ of its own is not differentiated
        dB, dlam = torch.autograd.grad(B_hat, (B, lam), dB_hat[:, :columns].to(B.dtype))
    return dA, dB, None if dlam is None else dlam.reshape(1)


def row_norm(
    weight: Tensor, A_hat: Tensor, B_hat: Tensor, scale: float, magnitude: Tensor | None, scaled: bool
) -> Results:
    """‖W_o + scale · B̂_o Â‖₂ for every row o, c = m / ‖·‖, c ⊙ W."""
    norm = (weight + scale * _mm(B_hat, A_hat)).norm(dim=-1)
    c = None if magnitude is None else _divide(magnitude, norm)
    return norm, c, None if c is None or not scaled else c[:, None] * weight


def _divide(numerator: Tensor, denominator: Tensor) -> Tensor:
    return (numerator / denominator).masked_fill(denominator == 0, 0)


def project(x: Tensor, A_hat: Tensor, masks: Masks) -> Tensor:
    """drop(x) Âᵀ, with `ranks` each block of Â's rows by its own mask of [len(ranks), T, K]."""
    ranks, dropout_p, mask = masks
    if ranks and mask is not None:
        blocks = zip(A_hat.split(list(ranks)), dropout_p, mask, strict=True)
        return torch.cat([_mm(x * m / (1 - p), A.T) for A, p, m in blocks], dim=1)
    return _mm(_drop(x, dropout_p[0], mask), A_hat.T)


def expand(x: Tensor, weight: Tensor, bias: Tensor | None, term: RankTerm, rescaling: Rescaling) -> Two:
    """y = (x − drop(x)) Wᵀ + c ⊙ u + bias, u = drop(x) Wᵀ + scale · h B̂ᵀ; `scaled` says nothing
    new.
    """
    (h, B_hat, scale), (c, _, keep, dropout_p, mask) = term, rescaling
    dropped = _drop(x, dropout_p, mask)
    u = _mm(dropped, weight.T) + scale * _mm(h, B_hat.T)
    y = u if c is None else c * u
    if mask is not None:
        y = y + _mm(x - dropped, weight.T)
    return (y if bias is None else y + bias), (u if keep else None)


def expand_backward(dy: Tensor, term: TermGradients, rescaled: Rescaled, need_bias: bool) -> Results:
    """dv = (c ⊙ dy) B̂, dB̂ = scale · (c ⊙ dy)ᵀ h, dm = Σ_t dy ⊙ u / divisor, Σ_t dy; what was kept
    is u.
    """
    (h, B_hat, scale), (c, u, _, divisor) = term, rescaled
    du = dy if c is None else c * dy
    dv = None if B_hat is None else _mm(du, B_hat)
    dB_hat = None if h is None else scale * _mm(du.T, h)
    dm = None if u is None or divisor is None else _divide((dy * u).sum(0), divisor)
    return dv, dB_hat, dm, (dy.sum(0) if need_bias else None)


def input_backward(dy: Tensor, frozen: Frozen, branch: Branch, masks: Masks) -> Results:
    """dx = (c ⊙ dy) W + drop(scale · dv Â), or with two terms dy W + drop(((c − 1) ⊙ dy) W + scale
    · dv Â);
    dÂ = scale · dvᵀ drop(x), with `ranks` both block by block."""
    (weight, c, two_term), (dv, A_hat, x, r, scale), (ranks, dropout_p, mask) = frozen, branch, masks
    columns = list(ranks) if ranks and mask is not None else [dv.shape[1]]
    each_mask = [mask] if not ranks or mask is None else list(mask)
    blocks = list(zip(dv.split(columns, dim=1), dropout_p, each_mask, strict=True))
    dx = dA_hat = None
    if weight is not None and A_hat is not None:
        du = dy if c is None else c * dy
        terms = [(scale * _mm(v, A), p, m) for (v, p, m), A in zip(blocks, A_hat.split(columns), strict=True)]
        if two_term:
            terms = [(term + _mm(du - dy, weight), p, m) for term, p, m in terms]
            du = dy
        dx = _mm(du, weight) + sum(_drop(term, p, m) for term, p, m in terms)
    if x is not None:
        dA_hat = torch.cat([scale * _mm(v.T, _drop(x, p, m)) for v, p, m in blocks])[:r]
    return dx, dA_hat


def weight_grad(dy: Tensor, x: Tensor, c: Tensor | None, dropout_p: float, mask: Tensor | None) -> Tensor:
    """dW = dyᵀ (x − drop(x)) + (c ⊙ dy)ᵀ drop(x)."""
    dropped = _drop(x, dropout_p, mask)
    dW = _mm(dy.T if c is None else (c * dy).T, dropped)
    return dW if mask is None else dW + _mm(dy.T, x - dropped)


def project_route(x: Tensor, A_hat: Tensor, masks: Masks, gates: Tensor | None, top_k: int, gating: Gating) -> Results:
    """project, then the gating."""
    h = project(x, A_hat, masks)
    return h, *_route(h, gates, top_k, gating)


def _route(h: Tensor, gates: Tensor | None, top_k: int, gating: Gating) -> Results:
    """One expert at a time: v_e = w_e s_e u_e, and the means of what was chosen, of P and of
    logsumexp².
    """
    experts, rank, _, shared, scale, token_share = gating
    w, P, z = _weights(h, gates, top_k, gating)
    chosen = w != 0
    v = [w[:, e, None] * scale[e] * h[:, _columns(0 if shared else e, rank)] for e in range(experts)]
    v = [value.to(h.dtype) for value in v]
    passed = h[:, (1 if shared else experts) * rank + (experts if gates is None else 0) :]
    share = w.new_full((len(w),), 1 / max(1, len(w))) if token_share is None else token_share
    means = [_mm(share, value) for value in (chosen.to(w.dtype), P, z)]
    return torch.cat([*v, passed], dim=1), (w if gates is None else None), means[0], means[1], means[2].reshape(1)


def _weights(h: Tensor, gates: Tensor | None, top_k: int, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    """w [T, E], P [T, E] and logsumexp² [T]."""
    experts, rank, renormalize, shared, *_ = gating
    if gates is not None:
        return gates, gates, gates.new_zeros(len(gates))
    first = (1 if shared else experts) * rank
    logits = h[:, first : first + experts].to(torch.promote_types(h.dtype, torch.float32))
    P = logits.softmax(1)
    best = P.detach().topk(top_k, dim=1).values[:, -1:]
    w = torch.where(P >= best, P, 0.0)  # logits far apart: no ties
    return (w / w.sum(1, keepdim=True) if renormalize else w), P, logits.logsumexp(1).square()


def _columns(e: int, rank: int) -> slice:
    return slice(e * rank, (e + 1) * rank)


def expand_route_backward(
    dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, gated: Gated, gating: Gating
) -> Results:
    """dv = dy B̂ and what autograd makes of the gating's formula, with the same experts chosen; dB̂
    = dyᵀ v, Σ_t dy.
    """
    h, w, given, dP, dz, need_scale = gated
    dv, dB_hat, _, dy_sum = expand_backward(dy, TermGradients(v, B_hat), Rescaled(), need_bias)
    with torch.enable_grad():
        leaves = [value.detach().clone().requires_grad_() for value in (h, w, gating.scale)]
        top_k = int((w[0] != 0).sum()) if not given and len(w) else gating.experts
        gates = leaves[1] if given else None
        weighed, _, _, P, z = _route(leaves[0], gates, top_k, gating._replace(scale=leaves[2]))
        assert weighed is not None
        assert dv is not None
        assert P is not None
        assert z is not None
        total = (weighed * dv).sum() + (P * dP).sum() + (z * dz).sum()
        dh, dw, dscale = torch.autograd.grad(total, leaves, allow_unused=True)
    return dh, dB_hat, dy_sum, (dw if given else None), (dscale if need_scale else None)


def _drop(x: Tensor, dropout_p: float, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask / (1 - dropout_p)


def _mm(left: Tensor, right: Tensor) -> Tensor:
    dtype = torch.promote_types(left.dtype, right.dtype)
    return left.to(dtype) @ right.to(dtype)


def reflect(x: Tensor, u: Tensor, v: Tensor | None, bias: Tensor | None) -> Tensor:
    """x H + bias, H a matrix."""
    wide = torch.promote_types(x.dtype, u.dtype)
    y = x.to(wide) @ _reflection(u, v).to(wide)
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)


def reflect_backward(dy: Tensor, x: Tensor, u: Tensor, v: Tensor | None, need_dx: bool) -> Results:
    """dx = dy H; du and dv by autograd through H."""
    wide = torch.promote_types(x.dtype, u.dtype)
    leaves = [t.detach().requires_grad_() for t in ((u,) if v is None else (u, v))]
    with torch.enable_grad():
        H = _reflection(*leaves, *(None,) * (2 - len(leaves))).to(wide)
        grads = torch.autograd.grad(x.to(wide) @ H, leaves, dy.to(wide))
    du, dv = (*grads, None)[:2]
    return (dy.to(wide) @ H.detach()).to(dy.dtype) if need_dx else None, du, dv


def _reflection(u: Tensor, v: Tensor | None) -> Tensor:
    """blockdiag(I − 2 ûûᵀ) or blockdiag(I − ûûᵀ + v̂v̂ᵀ), [C, C]."""

    def outer(vectors: Tensor) -> Tensor:
        length = vectors.norm(dim=1, keepdim=True)
        directions = vectors / length.masked_fill(length == 0, torch.inf)
        return torch.block_diag(*(d[:, None] * d for d in directions))

    identity = torch.eye(u.numel(), dtype=u.dtype, device=u.device)
    return identity - 2 * outer(u) if v is None else identity - outer(u) + outer(v)


def grouped_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    dropout_p: float,
    seed: Tensor | None,
) -> Two:
    """Every expert on every row, of which each keeps its own: y, and h = scale · drop(x) Âᵀ."""
    member, h = _members(x, offsets), None
    each = torch.einsum("tk,enk->ten", x, weight)
    each = each if bias is None else each + bias
    if A_hat is not None and B_hat is not None:
        wide = torch.promote_types(x.dtype, A_hat.dtype)
        seen = _masked(x.to(wide), dropout_p, seed)
        h = scale * torch.einsum("te,tk,erk->tr", member.to(wide), seen, A_hat.to(wide))
        each = each + torch.einsum("tr,enr->ten", h, B_hat.to(wide))
    return torch.einsum("te,ten->tn", member.to(each.dtype), each), h


def grouped_backward(
    dy: Tensor,
    x: Tensor | None,
    h: Tensor | None,
    weight: Tensor | None,
    offsets: Tensor,
    A_hat: Tensor | None,
    B_hat: Tensor | None,
    scale: float,
    need_bias: bool,
    dropout_p: float,
    seed: Tensor | None,
) -> Results:
    """dx, dÂ, dB̂ and Σ_t dy of each expert, of the rows that are its own."""
    member = _members(dy, offsets)
    dx = dA = dB = dv = None
    if B_hat is not None and (x is not None or A_hat is not None):
        wide = torch.promote_types(dy.dtype, B_hat.dtype)
        dv = scale * torch.einsum("te,tn,enr->tr", member.to(wide), dy.to(wide), B_hat.to(wide))
    if weight is not None:
        dx = torch.einsum("te,tn,enk->tk", member, dy, weight)
        if dv is not None and A_hat is not None:
            term = torch.einsum("te,tr,erk->tk", member.to(dv.dtype), dv, A_hat.to(dv.dtype))
            dx = dx + _masked(term, dropout_p, seed)
    if dv is not None and x is not None:
        dA = torch.einsum("te,tr,tk->erk", member.to(dv.dtype), dv, _masked(x.to(dv.dtype), dropout_p, seed))
    if h is not None:
        wide = torch.promote_types(dy.dtype, h.dtype)
        dB = torch.einsum("te,tn,tr->enr", member.to(wide), dy.to(wide), h.to(wide))
    return dx, dA, dB, torch.einsum("te,tn->en", member, dy) if need_bias else None


def grouped_weight_grad(dy: Tensor, x: Tensor, offsets: Tensor) -> Tensor:
    """dyᵀ x over each expert's rows."""
    return torch.einsum("te,tn,tk->enk", _members(dy, offsets), dy, x)


def _masked(x: Tensor, dropout_p: float, mask: Tensor | None) -> Tensor:
    return x if mask is None else x * mask.to(x.dtype) / (1 - dropout_p)


def _members(x: Tensor, offsets: Tensor) -> Tensor:
    """[T, E]: 1 where a row is an expert's, else 0."""
    t, ends = torch.arange(x.shape[0], device=x.device)[:, None], offsets.to(torch.int64)
    return ((t < ends) & (t >= torch.cat([ends.new_zeros(1), ends[:-1]]))).to(x.dtype)
