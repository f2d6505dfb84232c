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
from torch.nn.functional import linear

from delora_kernels import ops
from delora_kernels.autograd.function import refuse_second_derivatives
from delora_kernels.autograd.low_rank_direct import frozen_linear, is_ordinary, rows, shaped, without_a_look
from delora_kernels.autograd.low_rank_stages import Saved, gradients
from delora_kernels.backends.eager import low_rank as eager
from delora_kernels.backends.eager.fold import Stack, stack_of, unfold_stack
from delora_kernels.backends.eager.thin_products import by_columns, token_product
from delora_kernels.call import Call, Options

_INPUTS = {"lora_linear": 4, "dora_linear": 5, "delora_linear": 6}
"""Method → its tensors besides x: weight, bias, A, B, then magnitude, or λ and the weight norms."""
_KEPT = {"lora_linear": 3, "dora_linear": 6, "delora_linear": 5}
"""Method → how many tensors of a member are kept: weight, A, B, then c, norm and x Wᵀ, or λ and the
weight norms.
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
    outputs: tuple[Tensor, ...] = _apply(options, torch.is_grad_enabled(), calls[0].x, *inputs)
    return outputs


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, options: list[Options], keep: bool, x: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        members = _by_member(options, _INPUTS, inputs)
        need_x, tokens = ctx.needs_input_grad[2], rows(x)
        stack = _stack(options, [member[2:] for member in members])
        h = linear(tokens, stack.A_hat)
        parts = _columns(h if stack.factor is None else h * stack.factor, stack.ranks)
        outputs: list[Tensor] = []
        saved: list[Any] = []
        for o, (weight, bias, A, B, *rest), h_i in zip(options, members, parts, strict=True):
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
                out.addmm_(h_i, B.t(), alpha=o.scale)
                kept += tuple(rest)
            outputs.append(y)
            saved += kept
        ctx.options, ctx.trained = options, [input_ for member in members for input_ in (*member[2:4], *member[4:5])]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(x, h, stack.norms, *saved)
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        x, h, norms, *saved = ctx.saved_tensors
        members = _by_member(ctx.options, _KEPT, saved)
        live = [i for i, dy in enumerate(dys) if dy is not None]
        if not live:
            return (None, None, None, *[None] * sum(_INPUTS[o.method] for o in ctx.options))
        found = [each for each in dys if each is not None]
        if not all([is_ordinary(each) for each in found]):  # noqa: C419, for torch 2.7
            return _by_stages(ctx, dys, x, h, norms, members)
        tokens, need_x, ranks = rows(x), ctx.needs_input_grad[2], [member[1].shape[0] for member in members]
        if len(live) < len(members):
            h = torch.cat([_columns(h, ranks)[i] for i in live], dim=1)
            norms = None if norms is None else torch.cat([_columns(norms, ranks)[i] for i in live], dim=1)
        o, kept = [ctx.options[i] for i in live], [members[i] for i in live]
        dy = [rows(each) for each in found]
        stack = _stack(o, [member[1:] for member in kept], norms)
        dv, dx = torch.empty_like(h), None
        for dy_i, dv_i, o_i, (weight, _, B, *rest) in zip(dy, _columns(dv, stack.ranks), o, kept, strict=True):
            c = rest[0] if len(rest) == 3 else None
            right = by_columns(B if c is None else B * c[:, None], dy_i)
            torch.addmm(dv_i, dy_i, right, beta=0, alpha=o_i.scale, out=dv_i)
            if need_x:
                dx = _added(dx, dy_i, weight, c)
        along = None
        if stack.factor is not None:
            along = (dv * h).sum(0)
            dv *= stack.factor
            h = h * stack.factor
        dA_hat = torch.mm(dv.t(), tokens)
        if dx is not None:
            dx.addmm_(dv, stack.A_hat)
        dBs = [
            token_product(dy_i, h_i, o_i.scale, B)
            for dy_i, h_i, o_i, (_, _, B, *_) in zip(dy, _columns(h, stack.ranks), o, kept, strict=True)
        ]
        dAs = dA_hat.split_with_sizes(stack.ranks)
        dlams = None if along is None else unfold_stack(dA_hat, dBs, along, stack)
        grads: list[Any] = [None, None, None if dx is None else shaped(dx, x)]
        place = 0
        for i, own in enumerate(ctx.options):
            if dys[i] is None:
                grads += [None] * _INPUTS[own.method]
                continue
            dB, (_, _, B, *rest) = dBs[place], kept[place]
            grads += [None, None, dAs[place], dB]
            if own.method == "delora_linear" and dlams is not None:
                grads += [dlams[place].view(rest[0].shape), None]
            elif own.method == "dora_linear":
                c, norm, base = rest
                grads.append(eager.quotient(eager.token_dots(dy[place], base).add_((dB * B).sum(1)), norm))
                dB *= c[:, None]
            place += 1
        return tuple(grads)


_apply = without_a_look(_SharedInput)


def _by_member(options: Sequence[Options], counts: dict[str, int], flat: Sequence[Any]) -> list[Sequence[Any]]:
    """Return `flat` in the parts of each member."""
    parts, start = [], 0
    for o in options:
        stop = start + counts[o.method]
        parts.append(flat[start:stop])
        start = stop
    return parts


def _columns(matrix: Tensor, ranks: list[int]) -> Any:
    """Return the columns of a [T, R] matrix that belong to each member."""
    return matrix.split_with_sizes(ranks, 1)


def _stack(options: Sequence[Options], factors: Sequence[Any], norms: Tensor | None = None) -> Stack:
    """Return the factors of members side by side; of each A, B, and behind DeLoRA's λ and the
    weight norms.
    """
    members, eps = [], 0.0
    for o, (A, B, *rest) in zip(options, factors, strict=True):
        if o.method == "delora_linear":
            members.append((A, B, *rest))
            eps = o.eps
        else:
            members.append((A, B, None, None))
    return stack_of(members, eps, norms)


def _added(dx: Tensor | None, dy: Tensor, weight: Tensor, c: Tensor | None) -> Tensor:
    """dx + (dy ⊙ c) W, in dx where there is one."""
    return torch.mm(*eager.scaled_pair(dy, weight, c)) if dx is None else dx.addmm_(*eager.scaled_pair(dy, weight, c))


def _by_stages(
    ctx: Any, dys: Sequence[Tensor | None], x: Tensor, h: Tensor, norms: Tensor | None, members: list[Sequence[Any]]
) -> tuple[Any, ...]:
    """Compute the gradients of an extraordinary backward pass, member by member, by the registered
    ops.
    """
    need_x, dx, depends_on = ctx.needs_input_grad[2], None, [x, *ctx.trained]
    grads: list[Any] = []
    ranks = [len(member[1]) for member in members]
    own_norms = [None] * len(members) if norms is None else _columns(norms, ranks)
    for o, member, dy, h_i, norms_i in zip(ctx.options, members, dys, _columns(h, ranks), own_norms, strict=True):
        if dy is None:
            grads += [None] * _INPUTS[o.method]
            continue
        own, (weight, A, B, *rest) = o.method, member
        kept = Saved(x=rows(x), weight=weight, h=h_i, A=A, B=B)
        if own == "dora_linear":
            kept = kept._replace(c=rest[0], kept_divisor=rest[1], kept=rest[2])
        elif own == "delora_linear":
            kept = kept._replace(lam=rest[0], weight_norm=rest[1], a=norms_i[0], b=norms_i[1])
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
