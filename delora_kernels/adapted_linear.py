"""The autograd Function of every additive method: which stages run in which order, and what is kept for backward.

    Â, B̂ = fold(A, B, ...)            h = drop(x) Âᵀ
    u = x Wᵀ + scale · h B̂ᵀ           y = c ⊙ u + bias

Kept: x (the caller's own tensor, shared with sibling layers; under autocast its cast copy, one a layer), h [T, R],
Â and B̂ where they are not A and B themselves, vectors, and for DoRA one [T, N] tensor (or y itself on request); of
these only what the wanted gradients need.
Derivations: docs/math.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.call import Call
from delora_kernels.frozen import FrozenLinear


def run(call: Call) -> Tensor:
    """The output [T, N] of `call`, differentiable once where a tensor of it requires grad."""
    if torch.is_grad_enabled():
        for value in call:
            if isinstance(value, Tensor) and value.requires_grad:
                return AdaptedLinear.apply(*call)
    return _forward(call, keep=False).y


class _Stages(NamedTuple):
    """What the forward pass computed: y and what DoRA keeps [T, N], h [T, R], factors, norms and DoRA's c."""

    x: Tensor
    y: Tensor
    kept: Tensor
    h: Tensor
    A_hat: Tensor
    B_hat: Tensor
    a: Tensor | None
    b: Tensor | None
    norm: Tensor | None
    c: Tensor | None


def _forward(call: Call, keep: bool) -> _Stages:
    device = call.x.device.type
    if torch.is_autocast_enabled(device):  # the options hold every dtype
        with torch.autocast(device, enabled=False):
            return _forward(call, keep)
    o = call.options
    x = _cast(call.x, o.compute_dtype)
    weight = FrozenLinear(call.weight).dense(o.compute_dtype)
    stages = ops.stages(o.backend, call.tensors)
    a = b = norm = c = None
    if call.lam is None and call.A.dtype == call.B.dtype == o.rank_dtype:
        A_hat, B_hat = call.A, call.B
    else:
        A_hat, B_hat, a, b = stages.fold(
            call.A,
            call.B,
            call.lam,
            call.weight_norm,
            call.frozen_A,
            call.frozen_B,
            call.frozen_lam,
            o.eps,
            o.rank_dtype,
        )
    scaled = None
    if call.magnitude is not None:
        wanted = not keep and not o.two_term and ops.wants_scaled(o.backend, x, weight)
        norm, c, written = stages.row_norm(weight, A_hat, B_hat, o.scale, call.magnitude, wanted)
        scaled = written if wanted else None
    h = stages.project(x, A_hat, o.ranks, o.dropout_p, call.seed)
    u_dropout = (o.dropout_p[0], call.seed) if o.two_term else (0.0, None)
    y, kept = stages.expand(x, weight, call.bias, h, B_hat, o.scale, c, scaled, keep, *u_dropout)
    return _Stages(x, y, kept, h, A_hat, B_hat, a, b, norm, c)


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    weight: Tensor | None
    h: Tensor | None
    A_hat: Tensor | None
    B_hat: Tensor | None
    seed: Tensor | None
    c: Tensor | None
    kept: Tensor | None
    kept_divisor: Tensor | None
    A: Tensor | None
    B: Tensor | None
    lam: Tensor | None
    weight_norm: Tensor | None
    frozen_B: Tensor | None
    a: Tensor | None
    b: Tensor | None


class AdaptedLinear(torch.autograd.Function):
    """y = c ⊙ (x Wᵀ + scale · drop(x) Âᵀ B̂ᵀ) + bias of one `Call`, and every gradient of it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        call = Call(*inputs)
        need = Call(*ctx.needs_input_grad)
        o = call.options
        s = _forward(call, keep=bool(need.magnitude) and not o.save_output)

        need_dv, need_dB_hat = need.x or need.A or need.magnitude, need.B or need.lam or need.magnitude
        folded = call.lam is not None
        kept, kept_divisor = (s.y, call.magnitude) if o.save_output else (s.kept, s.norm)
        saved = _Saved(
            x=s.x if need.A or need.weight else None,
            weight=call.weight if need.x else None,
            h=s.h if need_dB_hat else None,
            A_hat=s.A_hat if need.x else None,
            B_hat=s.B_hat if need_dv else None,
            seed=call.seed,
            c=s.c,
            kept=kept if need.magnitude else None,
            kept_divisor=kept_divisor if need.magnitude else None,
            A=call.A if folded else None,
            B=call.B if folded else None,
            lam=call.lam,
            weight_norm=call.weight_norm,
            frozen_B=call.frozen_B if need.lam and call.frozen_lam is None else None,
            a=s.a,
            b=s.b,
        )
        ctx.save_for_backward(*saved)
        ctx.options, ctx.r = o, call.A.shape[0]
        ctx.wanted = [
            (name, value.dtype if wanted else None)
            for name, value, wanted in zip(Call._fields, inputs, ctx.needs_input_grad, strict=True)
        ]
        ctx.lam_shape = None if call.lam is None else call.lam.shape
        ctx.factors = (call.A, call.B, call.magnitude, call.lam)
        return s.y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy, _Saved(*saved))
        with torch.no_grad():
            grads = _gradients(ctx, dy, _Saved(*saved))
        return refuse_second_derivatives(ctx.options.method, grads, (dy, *saved, *ctx.factors))


class _SecondDerivative(torch.autograd.Function):
    """The gradients as they are; differentiating them again raises."""

    @staticmethod
    def forward(ctx: Any, method: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.method = method
        return tuple(tensor.view_as(tensor) for tensor in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *_: Any) -> Any:
        raise RuntimeError(
            f"{ctx.method} has no second derivative: its gradients can't be differentiated again; "
            f"use delora_kernels.reference.{ctx.method} there, or restore() the model"
        )


def refuse_second_derivatives(
    method: str, grads: tuple[Tensor | None, ...], depends_on: tuple[Tensor | None, ...]
) -> tuple[Tensor | None, ...]:
    """Tie the gradients to all they were computed from, by a node that raises, wherever differentiation enters."""
    wanted = [grad for grad in grads if grad is not None]
    tied = iter(_SecondDerivative.apply(method, len(wanted), *wanted, *(t for t in depends_on if t is not None)))
    return tuple(None if grad is None else next(tied) for grad in grads)


def _gradients(ctx: Any, dy: Tensor, saved: Any) -> tuple[Tensor | None, ...]:
    """The gradient of every input of the Function that wants one, in its dtype."""
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy, saved)
    need, o = Call(*ctx.needs_input_grad), ctx.options
    stages = ops.stages(o.backend, (dy, *saved))
    grad: dict[str, Any] = {}
    dv, dB_hat, dm, dy_sum = stages.expand_backward(
        dy, saved.h, saved.B_hat, o.scale, saved.c, saved.kept, o.save_output, saved.kept_divisor, bool(need.bias)
    )
    dA_hat = None
    if need.x or need.A:
        dx, dA_hat = stages.input_backward(
            dy,
            FrozenLinear(saved.weight).dense(o.compute_dtype) if need.x else None,
            dv,
            saved.A_hat,
            saved.x if need.A else None,
            ctx.r,
            o.scale,
            saved.c,
            o.ranks,
            o.dropout_p,
            saved.seed,
            o.two_term,
        )
        grad["x"] = dx
    if saved.lam is None:
        grad.update(A=dA_hat, B=dB_hat)
    else:
        dA, dB, dlam = stages.fold_backward(
            dA_hat if need.A else None,
            dB_hat if saved.h is not None else None,
            saved.A,
            saved.B,
            saved.lam,
            saved.weight_norm,
            saved.frozen_B,
            saved.a,
            saved.b,
            o.eps,
        )
        grad.update(A=dA, B=dB)
        if need.lam:
            grad["lam"] = dlam.reshape(ctx.lam_shape)
    grad.update(magnitude=dm, bias=dy_sum)
    if need.weight:
        u_dropout = (o.dropout_p[0], saved.seed) if o.two_term else (0.0, None)
        grad["weight"] = stages.weight_grad(dy, saved.x, saved.c, *u_dropout)
    return tuple(None if dtype is None else _cast(grad[name], dtype) for name, dtype in ctx.wanted)


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """tensor.to(dtype), without the cost of a call that does nothing."""
    return tensor if tensor.dtype == dtype else tensor.to(dtype)
