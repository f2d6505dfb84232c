"""Several additive linears of one x as one call: x is read once for all their A, dx is one buffer.

    h = x [Â₁; Â₂; ...]ᵀ               y_i = c_i ⊙ (x W_iᵀ + s_i · h_i B̂_iᵀ) + bias_i
    dv_i = s_i · dy_i (c_i ⊙ B̂_i)      dx = Σ dy_i (c_i ⊙ W_i) + dv [Â₁; Â₂; ...]      dÂ = dvᵀ x

Straight torch calls for the eager backend, as in low_rank_direct.py, which takes the members one by
one: what each keeps is the same, but for x, which all share. An output without a gradient costs
nothing, and the gradients of its own factors are None. Everything out of the ordinary in a backward
pass goes to the stages, member by member.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd.function import refuse_second_derivatives
from delora_kernels.autograd.low_rank_direct import frozen_linear, is_ordinary, rows, shaped
from delora_kernels.autograd.low_rank_stages import Saved, gradients
from delora_kernels.backends.eager import low_rank as eager
from delora_kernels.backends.eager.fold import fold, refolded, unfold
from delora_kernels.call import Call, Options
from delora_kernels.op_arguments import Start, Strength

_NO_START = Start()
_INPUTS = {"lora_linear": 4, "dora_linear": 5, "delora_linear": 6}
"""Method → its tensors besides x: weight, bias, A, B, then magnitude, or λ and the weight norms."""
_KEPT = {"lora_linear": 3, "dora_linear": 6, "delora_linear": 7}
"""Method → how many tensors of a member are kept: weight, A, B, then c, norm and x Wᵀ, or λ, the
weight norms and both factors' norms.
"""


def shared_direct(calls: Sequence[Call]) -> tuple[Tensor, ...]:
    """Run calls of one x [..., K] that each ask for no more than the arithmetic of one dtype:
    y_i [..., N_i] of each.
    """
    inputs: list[Any] = []
    for call in calls:
        inputs += (call.weight, call.bias, call.A, call.B)
        if call.magnitude is not None:
            inputs.append(call.magnitude)
        elif call.lam is not None:
            inputs += (call.lam, call.weight_norm)
    options = [call.options for call in calls]
    outputs: tuple[Tensor, ...] = _SharedInput.apply(options, torch.is_grad_enabled(), calls[0].x, *inputs)
    return outputs


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: list[Options], keep: bool, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        members = _by_member(options, _INPUTS, inputs)
        need_x, tokens = ctx.needs_input_grad[2], rows(x)
        pairs: list[tuple[Any, ...]] = [
            fold(A, B, Strength(rest[0], rest[1], o.eps), _NO_START, x.dtype) if len(rest) == 2 else (A, B)
            for o, (_, _, A, B, *rest) in zip(options, members, strict=True)
        ]
        h = torch.mm(tokens, torch.cat([pair[0] for pair in pairs]).t())
        outputs: list[Tensor] = []
        saved: list[Any] = []
        for o, (weight, bias, A, B, *rest), pair, h_i in zip(options, members, pairs, _columns(h, pairs), strict=True):
            kept: tuple[Any, ...] = (weight if need_x else None, A, B)
            if len(rest) == 1:
                y = x.new_empty((*x.shape[:-1], weight.shape[0]))
                base = torch.mm(tokens, weight.t(), out=None if keep else rows(y))
                norm = eager.updated_norm(weight, A, B, o.scale)
                c = eager.quotient(rest[0], norm)
                eager.rescale(base, h_i, B, o.scale, c, bias, rows(y))
                kept += (c, norm, base)
            else:
                y, out = frozen_linear(x, weight, bias)
                out.addmm_(h_i, pair[1].t(), alpha=o.scale)
                kept += (*rest, *pair[2:])
            outputs.append(y)
            saved += kept
        ctx.options, ctx.trained = options, [input_ for member in members for input_ in (*member[2:4], *member[4:5])]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, h, *saved = ctx.saved_tensors
        found = [each for each in dys if each is not None]
        members = _by_member(ctx.options, _KEPT, saved)
        if not found:
            return (None, None, None, *[None] * sum(_INPUTS[o.method] for o in ctx.options))
        if not all(map(is_ordinary, found)):
            return _by_stages(ctx, dys, x, h, members)
        tokens, need_x = rows(x), ctx.needs_input_grad[2]
        live = [(i, rows(dy)) for i, dy in enumerate(dys) if dy is not None]
        factors = {i: _factors(ctx.options[i], members[i]) for i, _ in live}
        parts = _columns(h, [member[1:2] for member in members])
        dv = h.new_empty((len(h), sum(len(factors[i][0]) for i, _ in live)))
        dv_parts = dict(zip(factors, _columns(dv, list(factors.values())), strict=True))
        dx, dB_hats = None, {}
        for i, dy in live:
            (weight, *_), (_, B_hat, c, _), scale = members[i], factors[i], ctx.options[i].scale
            small = B_hat if c is None else B_hat * c[:, None]
            torch.addmm(dv_parts[i], dy, small, beta=0, alpha=scale, out=dv_parts[i])
            dB_hats[i] = eager.token_product(dy, parts[i], scale, members[i][2])
            if need_x:
                dx = _added(dx, dy, weight, c)
        dA_hat = torch.mm(dv.t(), tokens)
        if dx is not None:
            dx.addmm_(dv, torch.cat([A_hat for A_hat, *_ in factors.values()]))
        dA_hats = dict(zip(factors, dA_hat.split([len(A_hat) for A_hat, *_ in factors.values()]), strict=True))
        grads: list[Any] = [None, None, None if dx is None else shaped(dx, x)]
        for i, (o, member) in enumerate(zip(ctx.options, members, strict=True)):
            if i in factors:
                grads += _gradients_of(o, member, dys[i], dA_hats[i], dB_hats[i], factors[i][-1])
            else:
                grads += [None] * _INPUTS[o.method]
        return tuple(grads)


def _by_member(options: Sequence[Options], counts: dict[str, int], flat: Sequence[Any]) -> list[Sequence[Any]]:
    """Return `flat` in the parts of each member."""
    parts, start = [], 0
    for o in options:
        stop = start + counts[o.method]
        parts.append(flat[start:stop])
        start = stop
    return parts


def _columns(matrix: Tensor, pairs: Sequence[Sequence[Any]]) -> tuple[Tensor, ...]:
    """Return the columns of a [T, R] matrix that belong to each member's Â."""
    return matrix.split([len(pair[0]) for pair in pairs], dim=1)


def _factors(o: Options, member: Sequence[Any]) -> tuple[Tensor, Tensor, Tensor | None, Any]:
    """Â, B̂, c and the folded pair of a member, from what is kept of it."""
    _, A, B, *rest = member
    if o.method == "delora_linear":
        lam, weight_norm, a, b = rest
        pair = refolded(A, B, a, b, lam, weight_norm, o.eps)
        return pair.A_hat, pair.B_hat, None, pair
    return A, B, (rest[0] if rest else None), None


def _added(dx: Tensor | None, dy: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """dx + (dy ⊙ c) W, in dx where there is one."""
    return torch.mm(*eager.scaled_pair(dy, weight, c)) if dx is None else dx.addmm_(*eager.scaled_pair(dy, weight, c))


def _gradients_of(
    o: Options, member: Sequence[Any], dy: Any, dA_hat: Tensor, dB_hat: Tensor, pair: Any
) -> tuple[Any, ...]:
    """Return the gradients of a member's inputs."""
    _, A, B, *rest = member
    if o.method == "delora_linear":
        lam, weight_norm, *_ = rest
        dA, dB, dlam = unfold(dA_hat, dB_hat, A, B, weight_norm, pair)
        return None, None, dA, dB, dlam.view(lam.shape), None
    if o.method == "dora_linear":
        c, norm, base = rest
        dm = eager.quotient(eager.token_dots(rows(dy), base).add_((dB_hat * B).sum(1)), norm)
        return None, None, dA_hat, dB_hat.mul_(c[:, None]), dm
    return None, None, dA_hat, dB_hat


def _by_stages(
    ctx: Any, dys: Sequence[Tensor | None], x: Tensor, h: Tensor, members: list[Sequence[Any]]
) -> tuple[Any, ...]:
    """Compute the gradients of an extraordinary backward pass, member by member, by the registered
    ops.
    """
    need_x, dx, depends_on = ctx.needs_input_grad[2], None, [x, *ctx.trained]
    grads: list[Any] = []
    for o, member, dy, h_i in zip(ctx.options, members, dys, _columns(h, [each[1:2] for each in members]), strict=True):
        if dy is None:
            grads += [None] * _INPUTS[o.method]
            continue
        own, (weight, A, B, *rest) = o.method, member
        kept = Saved(x=rows(x), weight=weight, h=h_i, A=A, B=B)
        if own == "dora_linear":
            kept = kept._replace(c=rest[0], kept_divisor=rest[1], kept=rest[2])
        elif own == "delora_linear":
            kept = kept._replace(lam=rest[0], weight_norm=rest[1], a=rest[2], b=rest[3])
        wanted: Any = (need_x, False, False, True, True, own == "dora_linear", own == "delora_linear", *[False] * 6)
        with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
            found = gradients(o, Call(*wanted), kept, ops.registered("eager"), dy.reshape(len(h), dy.shape[-1]))
        own_dx = found["x"] if need_x else None
        dx = own_dx if dx is None or own_dx is None else dx + own_dx
        grads += [None, None, found["A"], found["B"]]
        grads += {"dora_linear": [found.get("magnitude")], "delora_linear": [found.get("lam"), None]}.get(own, [])
        depends_on += [dy, *(each for each in kept if each is not None)]
    result = (None, None, None if dx is None else shaped(dx, x), *grads)
    if not torch.is_grad_enabled():
        return result
    return refuse_second_derivatives(ctx.options[0].method, result, tuple(depends_on))
