"""A mixture's gating and its gradient in plain torch: [T, R] and [T, E] tensors, never wider."""

import torch
from torch import Tensor

from delora_kernels.backends.eager.low_rank import expand_backward, project
from delora_kernels.op_arguments import Gated, Gating, Masks, Rescaled, TermGradients


def route(h: Tensor, gates: Tensor | None, top_k: int, gating: Gating) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Softmax, choice, gate; all in float32 whatever h's dtype."""
    experts, rank, renormalize, shared, scale, token_share = gating
    acc = scale.dtype
    u, logits, rest = _parts(h, experts if gates is None else 0, rank if shared else experts * rank)
    if gates is None:
        logits = logits.to(acc)
        power, total, lse = _powers(logits)
        chosen = _largest(logits, top_k)
        P = power / total
        w = power / power.masked_fill(~chosen, 0).sum(1, keepdim=True) if renormalize else P
        w = w.masked_fill(~chosen, 0)
        z = _mean(lse.square_(), token_share)
    else:
        P = w = gates
        chosen = gates != 0
        z = scale.new_zeros(1)
    v = h.new_empty((h.shape[0], experts * rank + rest.shape[1]))
    v[:, : experts * rank].unflatten(1, (experts, rank)).copy_(_gate(w, scale, u.unflatten(1, (-1, rank)).to(acc)))
    v[:, experts * rank :] = rest
    return v, w if gates is None else w.new_empty(0), _mean(chosen.to(acc), token_share), _mean(P, token_share), z


def _parts(h: Tensor, logits: int, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """u, logits and the rest of h's columns."""
    return h[:, :width], h[:, width : width + logits], h[:, width + logits :]


def _largest(logits: Tensor, k: int) -> Tensor:
    """Which k entries of every row are the largest, bool [T, E]; the lowest index wins ties."""
    if k == logits.shape[1]:
        return torch.ones_like(logits, dtype=torch.bool)
    first = logits.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return torch.zeros_like(logits, dtype=torch.bool).scatter_(1, first, True)


def _powers(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """e^(logit − m) with the token's largest logit m, their sum, and log Σ e^logit: the largest one
    is in each sum.
    """
    largest = logits.amax(1, keepdim=True)
    power = (logits - largest).exp_()
    total = power.sum(1, keepdim=True)
    return power, total, total.log().add_(largest)


def _gate(w: Tensor, scale: Tensor, values: Tensor) -> Tensor:
    """w_te · s_e · values [T, E or 1, r] → [T, E, r]; an expert that is not chosen counts 0 even of
    Inf and NaN.
    """
    return ((w * scale).unsqueeze(2) * values).masked_fill_((w == 0).unsqueeze(2), 0)


def _mean(values: Tensor, token_share: Tensor | None) -> Tensor:
    """Return the mean over tokens of [T, n], or their sum by shares; a token without a share has no
    say, even if NaN.
    """
    if token_share is None:
        return values.sum(0) / max(1, values.shape[0])
    share = token_share.unsqueeze(1)
    return (values * share).masked_fill_(share == 0, 0).sum(0)


def route_backward(dv: Tensor, gated: Gated, gating: Gating) -> tuple[Tensor, Tensor, Tensor]:
    """dh, d gates, ds; everything the gates' gradients need is ⟨u_te, dv_te⟩, a [T, E] tensor."""
    h, w, given, dP, dz, need_scale = gated
    experts, rank, renormalize, shared, scale, token_share = gating
    acc = w.dtype
    width = rank if shared else experts * rank
    u, logits, _ = _parts(h, 0 if given else experts, width)
    dh = torch.empty_like(h)
    du, dlogits, drest = _parts(dh, 0 if given else experts, width)
    dgated = dv[:, : experts * rank].unflatten(1, (experts, rank)).to(acc)
    drest.copy_(dv[:, experts * rank :])
    du_each = _gate(w, scale, dgated)
    du.copy_(du_each.sum(1) if shared else du_each.flatten(1))
    aligned = (u.unflatten(1, (-1, rank)).to(acc) * dgated).sum(2)
    dscale = (w * aligned).masked_fill_(w == 0, 0).sum(0) if need_scale else w.new_empty(0)
    dw = aligned * scale
    share = w.new_full((1, 1), 1 / max(1, h.shape[0])) if token_share is None else token_share.unsqueeze(1)
    if given:
        return dh, dw + dP * share, dscale
    power, total, lse = _powers(logits.to(acc))
    P = power.div_(total)
    dw = dw.masked_fill_(w == 0, 0)
    kept = w if renormalize else P
    counted = (_softmax_backward(P, dP) + 2 * dz * lse * P) * share
    counted.masked_fill_(share == 0, 0)
    dlogits.copy_(_softmax_backward(kept, dw).masked_fill_(kept == 0, 0).add_(counted))
    return dh, w.new_empty(0), dscale


def _softmax_backward(p: Tensor, dp: Tensor) -> Tensor:
    """Gradient of the logits of p = softmax(logits): p ⊙ (dp − Σ p dp), the mean taken twice.

    Where dp's entries are close, what is left of them after the first subtraction is exact, and the
    second takes away what rounding left of the mean.
    """
    dp = dp - (p * dp).sum(1, keepdim=True)
    return p * (dp - (p * dp).sum(1, keepdim=True))


def project_route(
    x: Tensor, A_hat: Tensor, masks: Masks, gates: Tensor | None, top_k: int, gating: Gating
) -> tuple[Tensor, ...]:
    """Project, then gate."""
    h = project(x, A_hat, masks)
    return h, *route(h, gates, top_k, gating)


def expand_route_backward(
    dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, gated: Gated, gating: Gating
) -> tuple[Tensor, ...]:
    """dv and dB̂, then what the gating makes of dv."""
    dv, dB_hat, _, dy_sum = expand_backward(dy, TermGradients(v, B_hat), Rescaled(), need_bias)
    dh, dgates, dscale = route_backward(dv, gated, gating)
    return dh, dB_hat, dy_sum, dgates, dscale
