"""The additive methods in straight torch calls, where only arithmetic is left to do.

Small layers spend their time on the way to a GEMM, not in it: on the choice of ops, on tuples of
their arguments, on tensors of size 0 for results that nobody asked for. Where a call is of one
dtype, drops nothing and runs on the eager backend, these Functions do what low_rank_stages.py does,
operation for operation, and keep the same tensors in the same order: checkpointing may take one way
forward and the other again. Everything out of the ordinary in a backward
pass (autocast, batched gradients, second derivatives) goes back to the stages.
"""

from operator import itemgetter
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels import ops
from delora_kernels.autograd.function import is_batched, refuse_second_derivatives
from delora_kernels.autograd.low_rank_stages import Saved, gradients
from delora_kernels.backends import eager as eager_backend
from delora_kernels.backends.eager import low_rank as eager
from delora_kernels.backends.eager.fold import fold, refolded, unfold
from delora_kernels.backends.eager.thin_products import by_columns, product, token_product
from delora_kernels.call import Call, Options
from delora_kernels.op_arguments import Start, Strength

_NO_START = Start()
_STANDS_FOR = ("fold", "row_norm", "project", "expand", "expand_backward", "input_backward", "fold_backward")
_NOW = itemgetter(*_STANDS_FOR)
_DEFINED = _NOW(vars(eager_backend))


def ops_replaced() -> bool:
    """Whether somebody has put another op in the place of one whose part is done here: then that
    one is to run.
    """
    replaced: bool = _NOW(vars(eager_backend)) != _DEFINED
    return replaced


def direct(call: Call) -> Tensor:
    """Run a call that asks for no more than the arithmetic of one dtype, [..., K] → [..., N]."""
    x, weight, bias, A, B, o = call.x, call.weight, call.bias, call.A, call.B, call.options
    y: Tensor
    if call.magnitude is not None:
        y = _apply_dora(o, x, weight, bias, A, B, call.magnitude, torch.is_grad_enabled())
    elif call.lam is not None:
        y = _apply_delora(o, x, weight, bias, A, B, call.lam, call.weight_norm)
    else:
        y = _apply_lora(o, x, weight, bias, A, B)
    return y


class _Lora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, x: Tensor, weight: Tensor, bias: Any, A: Tensor, B: Tensor) -> Tensor:
        h = linear(rows(x), A)
        y, out = frozen_linear(x, weight, bias)
        out.addmm_(h, B.t(), alpha=o.scale)
        ctx.o, ctx.trained, need_x = o, (A, B), ctx.needs_input_grad[1]
        ctx.save_for_backward(x, weight if need_x else None, h, A if need_x else None, B)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, A, B = ctx.saved_tensors
        if not is_ordinary(dy):
            return _by_stages(ctx, dy, x, Saved(x=rows(x), weight=weight, h=h, A=A, B=B))
        dy, scale, tokens = rows(dy), ctx.o.scale, rows(x)
        dv = torch.mm(dy, by_columns(B, dy))
        dB = token_product(dy, h, scale, B)
        dA = product(dv.t(), tokens, scale, A)
        dx = torch.mm(dy, weight).addmm_(dv, A, alpha=scale) if ctx.needs_input_grad[1] else None
        return None, shaped(dx, x), None, None, dA, dB


class _Dora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, x: Tensor, weight: Tensor, bias: Any, *others: Any) -> Tensor:
        A, B, magnitude, keep = others  # without a gradient to come, y takes the frozen output's place
        tokens, y = rows(x), x.new_empty((*x.shape[:-1], weight.shape[0]))
        out = rows(y)
        h, base = linear(tokens, A), torch.mm(tokens, weight.t(), out=None if keep else out)
        norm = eager.updated_norm(weight, A, B, o.scale)
        c = eager.quotient(magnitude, norm)
        eager.rescale(base, h, B, o.scale, c, bias, out)
        ctx.o, ctx.trained, need_x = o, (A, B, magnitude), ctx.needs_input_grad[1]
        ctx.save_for_backward(x, weight if need_x else None, h, A if need_x else None, B, c, base, norm)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, A, B, c, base, norm = ctx.saved_tensors
        if not is_ordinary(dy):
            kept = Saved(x=rows(x), weight=weight, h=h, A=A, B=B, c=c, kept=base, kept_divisor=norm)
            return _by_stages(ctx, dy, x, kept)
        dy, scale, tokens, c_column = rows(dy), ctx.o.scale, rows(x), c[:, None]
        dv = torch.mm(dy, by_columns(B * c_column, dy))
        dB = token_product(dy, h, scale, B)
        dm = eager.quotient(eager.token_dots(dy, base).add_((dB * B).sum(1)), norm)
        dB *= c_column
        dA = product(dv.t(), tokens, scale, A)
        dx = eager.scaled_gemm(dy, weight, c).addmm_(dv, A, alpha=scale) if ctx.needs_input_grad[1] else None
        return None, shaped(dx, x), None, None, dA, dB, dm, None


class _Delora(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, o: Options, x: Tensor, weight: Tensor, bias: Any, *factors: Tensor) -> Tensor:
        A, B, lam, weight_norm = factors
        A_hat, B_hat, a, b = fold(A, B, Strength(lam, weight_norm, o.eps), _NO_START, x.dtype)
        h = linear(rows(x), A_hat)
        y, out = frozen_linear(x, weight, bias)
        out.addmm_(h, B_hat.t())
        ctx.o, ctx.trained = o, (A, B, lam)
        ctx.save_for_backward(x, weight if ctx.needs_input_grad[1] else None, h, A, B, lam, weight_norm, a, b)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, h, A, B, lam, weight_norm, a, b = ctx.saved_tensors
        if not is_ordinary(dy):
            kept = Saved(x=rows(x), weight=weight, h=h, A=A, B=B, lam=lam, weight_norm=weight_norm, a=a, b=b)
            return _by_stages(ctx, dy, x, kept)
        dy, tokens = rows(dy), rows(x)
        pair = refolded(A, B, a, b, lam, weight_norm, ctx.o.eps)
        dv = torch.mm(dy, by_columns(pair.B_hat, dy))
        dB_hat = token_product(dy, h, 1.0)
        dA_hat = torch.mm(dv.t(), tokens)
        dA, dB, dlam = unfold(dA_hat, dB_hat, A, B, weight_norm, pair)
        dx = torch.mm(dy, weight).addmm_(dv, pair.A_hat) if ctx.needs_input_grad[1] else None
        return None, shaped(dx, x), None, None, dA, dB, dlam.view(lam.shape), None


def without_a_look(function: Any) -> Any:
    """Return `apply` of a Function: torch's, without the look for transforms, which whoever comes
    here has taken.
    """
    return super(torch.autograd.Function, function).apply


_apply_lora, _apply_dora, _apply_delora = map(without_a_look, (_Lora, _Dora, _Delora))


def rows(x: Tensor) -> Tensor:  # here too: another file on the way of each call costs what this does
    """x [..., K] as [T, K]."""
    return x if x.dim() == 2 else x.flatten(0, -2)


def shaped(dx: Tensor | None, x: Tensor) -> Tensor | None:
    """dx [T, K] with x's dimensions."""
    return dx if dx is None or x.dim() == 2 else dx.view(x.shape)


def frozen_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return x Wᵀ + bias [..., N], and the same memory as [T, N].

    Of the Function's result and its rows, the rows are the view: a consumer may write into the
    result.
    """
    if x.dim() == 2:
        y = linear(x, weight, bias)
        return y, y
    if bias is None and x.is_contiguous():
        y = linear(x, weight)  # with a bias this is a view
        return y, y.flatten(0, -2)
    y = x.new_empty((*x.shape[:-1], weight.shape[0]))
    out = rows(y)
    if bias is None:
        torch.mm(rows(x), weight.t(), out=out)
    else:
        torch.addmm(bias, rows(x), weight.t(), out=out)
    return y, out


def is_ordinary(dy: Tensor) -> bool:
    """Whether a backward pass asks for no more than the arithmetic."""
    return not (torch.is_grad_enabled() or torch.is_autocast_enabled(dy.device.type) or is_batched(dy))


def _by_stages(ctx: Any, dy: Tensor, x: Tensor, kept: Any) -> tuple[Any, ...]:
    """Compute the gradients of an extraordinary backward pass, by the registered ops."""
    o, (_, need_x, *_) = ctx.o, ctx.needs_input_grad
    own = o.method
    wanted: Any = (need_x, False, False, True, True, own == "dora_linear", own == "delora_linear", *[False] * 6)
    with torch.no_grad(), torch.autocast(dy.device.type, enabled=False):
        grad = gradients(o, Call(*wanted), kept, ops.registered("eager"), dy.reshape(len(kept.h), dy.shape[-1]))
    names = {"dora_linear": ("magnitude",), "delora_linear": ("lam",)}.get(own, ())
    found = [grad[name] for name in ("A", "B", *names)]
    grads = (None, shaped(grad["x"], x) if need_x else None, None, None, *found, *[None] * (own != "lora_linear"))
    if not torch.is_grad_enabled():
        return grads
    return refuse_second_derivatives(
        o.method, grads, (dy, x, *ctx.trained, *[each for each in kept if each is not None])
    )
