"""The autograd Function of ETHER and ETHER+: reflections of activations around the frozen GEMM.

    x' = H_in x        z = x' Wᵀ        y = H_out z + bias

Every H is symmetric, so the gradients go the same way: dz = H_out dy, dx = H_in (dz W). Kept: x (the caller's own
tensor; under autocast its cast copy) where u, v or W want gradients, and z where u_out or v_out do. x' is not kept.
Derivations: docs/math.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels import ops
from delora_kernels.adapted_linear import refuse_second_derivatives
from delora_kernels.call import ReflectCall
from delora_kernels.frozen import FrozenLinear


def run(call: ReflectCall) -> Tensor:
    """The output [T, N] of `call`, differentiable once where a tensor of it requires grad."""
    if call.options.by_row_groups and call.u is not None:
        call = call._replace(weight=row_groups_reflected(call.weight, call.u, call.v), u=None, v=None)
    if torch.is_grad_enabled():
        for value in call:
            if isinstance(value, Tensor) and value.requires_grad:
                y: Tensor = ReflectedLinear.apply(*call)
                return y
    return _forward(call)[2]


def row_groups_reflected(weight: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
    """W with row group i reflected by H_i in every column block, differentiable by autograd (blocks="official").

    As the authors' code does it, by reading W as N · blocks chunks in a row, N of them for each H: where blocks does
    not divide N, groups end within a row.
    """
    n, D = u.shape
    with torch.autocast(weight.device.type, enabled=False):
        dtype = ops.accumulate_dtype(torch.promote_types(weight.dtype, u.dtype))
        S = torch.stack([u] if v is None else [u, v], dim=1).to(dtype)
        length = torch.linalg.vector_norm(S, dim=2, keepdim=True)
        S = S / length.masked_fill(length == 0, torch.inf)
        signs = S.new_tensor([-2.0] if v is None else [-1.0, 1.0])
        chunks = weight.reshape(n, weight.shape[0], D).to(dtype)
        chunks = torch.baddbmm(chunks, torch.bmm(chunks, S.transpose(1, 2)) * signs, S)
        return chunks.reshape(weight.shape).to(weight.dtype)


def reflected_weight(
    weight: Tensor,
    blocks: str,
    u: Tensor | None = None,
    v: Tensor | None = None,
    u_out: Tensor | None = None,
    v_out: Tensor | None = None,
) -> Tensor:
    """H_out W H_in [N, K] for merging, in float32 or wider; not differentiable."""
    dtype = weight.dtype
    for vectors in (u, u_out):
        dtype = dtype if vectors is None else torch.promote_types(dtype, vectors.dtype)
    turned = weight.to(ops.accumulate_dtype(dtype))
    if u is not None and blocks == "official" and u.shape[0] > 1:
        turned = row_groups_reflected(turned, u, v)
    elif u is not None:
        turned = ops.reflect(turned, u, v, None, "eager")
    if u_out is not None:
        turned = ops.reflect(turned.t(), u_out, v_out, None, "eager").t()
    return turned


def _forward(call: ReflectCall) -> tuple[Tensor, Tensor, Tensor]:
    """x in its compute dtype, z, y."""
    device = call.x.device.type
    if torch.is_autocast_enabled(device):  # the options hold every dtype
        with torch.autocast(device, enabled=False):
            return _forward(call)
    o = call.options
    x = call.x.to(o.compute_dtype)
    weight = FrozenLinear(call.weight).dense(o.compute_dtype)
    stages = ops.stages(o.backend, call.tensors)
    turned = x if call.u is None else stages.reflect(x, call.u, call.v, None)
    if call.u_out is None:
        y = linear(turned, weight, None if call.bias is None else call.bias.to(o.compute_dtype))
        return x, y, y
    z = linear(turned, weight)
    return x, z, stages.reflect(z, call.u_out, call.v_out, call.bias)


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    z: Tensor | None
    weight: Tensor | None
    u: Tensor | None
    v: Tensor | None
    u_out: Tensor | None
    v_out: Tensor | None


class ReflectedLinear(torch.autograd.Function):
    """y = H_out W H_in x + bias of one `ReflectCall`, and every gradient of it."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> Tensor:
        call = ReflectCall(*inputs)
        need = ReflectCall(*ctx.needs_input_grad)
        x, z, y = _forward(call)
        saved = _Saved(
            x=x if need.u or need.v or need.weight else None,
            z=z if need.u_out or need.v_out else None,
            weight=call.weight if need.x or need.u or need.v else None,
            u=call.u,
            v=call.v,
            u_out=call.u_out,
            v_out=call.v_out,
        )
        ctx.save_for_backward(*saved)
        ctx.options = call.options
        ctx.wanted = [
            (name, value.dtype if wanted else None)
            for name, value, wanted in zip(ReflectCall._fields, inputs, ctx.needs_input_grad, strict=True)
        ]
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy, _Saved(*saved))
        with torch.no_grad():
            grads = _gradients(ctx, dy, _Saved(*saved))
        return refuse_second_derivatives(ctx.options.method, grads, (dy, *saved))


def _gradients(ctx: Any, dy: Tensor, saved: _Saved) -> tuple[Tensor | None, ...]:
    """The gradient of every input of the Function that wants one, in its dtype."""
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy, saved)
    need, o = ReflectCall(*ctx.needs_input_grad), ctx.options
    stages = ops.stages(o.backend, (dy, *saved))
    grad: dict[str, Any] = {}
    if need.bias:
        *_, grad["bias"] = stages.expand_backward(dy, None, None, 1.0, None, None, False, None, True)
    turns = need.u or need.v
    dz = dy
    if saved.z is not None:
        need_dz = bool(need.x or turns or need.weight)
        dz, grad["u_out"], grad["v_out"] = stages.reflect_backward(dy, saved.z, saved.u_out, saved.v_out, need_dz)
    elif saved.u_out is not None:
        dz = stages.reflect(dy, saved.u_out, saved.v_out, None)
    if saved.weight is not None:
        turned = torch.mm(dz, FrozenLinear(saved.weight).dense(o.compute_dtype))
        if turns:
            grad["x"], grad["u"], grad["v"] = stages.reflect_backward(turned, saved.x, saved.u, saved.v, bool(need.x))
        else:
            grad["x"] = turned if saved.u is None else stages.reflect(turned, saved.u, saved.v, None)
    if need.weight:
        into = saved.x if saved.u is None else stages.reflect(saved.x, saved.u, saved.v, None)
        grad["weight"] = stages.weight_grad(dz, into, None, 0.0, None)
    return tuple(None if dtype is None else grad[name].to(dtype) for name, dtype in ctx.wanted)
