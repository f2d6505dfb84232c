"""The autograd Function of ETHER and ETHER+: reflections of activations around the frozen GEMM.

    x' = H_in x        z = x' Wᵀ        y = H_out z + bias

Every H is symmetric, so the gradients go the same way: dz = H_out dy, dx = H_in (dz W). Kept: x
(the caller's own tensor; under autocast its cast copy) where u, v or W want gradients, and z where
u_out or v_out do. x' is not kept. Without W y is x': what goes into or comes out of a base that
runs its own forward. Derivations: docs/math.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels import ops
from delora_kernels.autograd.function import Computed, differentiable
from delora_kernels.bases.plain import dense
from delora_kernels.call import ReflectCall, ReflectOptions
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.op_arguments import Rescaled, TermGradients


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    z: Tensor | None
    weight: Any
    u: Tensor | None
    v: Tensor | None
    u_out: Tensor | None
    v_out: Tensor | None


def _compute(call: ReflectCall, x: Tensor, need: ReflectCall, stages: Any) -> Computed:
    """y [T, N]; z, which is y itself where the output is not reflected, is kept where u_out or
    v_out want gradients.
    """
    o = call.options
    reflected = x if call.u is None else stages.reflect(x, call.u, call.v, None)
    weight = None if call.weight is None else dense(call.weight, o.compute_dtype)
    if weight is None:
        y = z = reflected
    elif call.u_out is None:
        y = z = linear(reflected, weight, None if call.bias is None else call.bias.to(o.compute_dtype))
    else:
        z = linear(reflected, weight)
        y = stages.reflect(z, call.u_out, call.v_out, call.bias)
    saved = _Saved(
        x=x if need.u or need.v or need.weight else None,
        z=z if need.u_out or need.v_out else None,
        weight=call.weight if need.x or need.u or need.v else None,
        u=call.u,
        v=call.v,
        u_out=call.u_out,
        v_out=call.v_out,
    )
    return Computed((y,), saved)


def _gradients(o: ReflectOptions, need: ReflectCall, saved: Any, stages: Any, dy: Tensor) -> dict[str, Any]:
    grad: dict[str, Any] = {}
    if need.bias:
        *_, grad["bias"] = stages.expand_backward(dy, TermGradients(None, None, 1.0), Rescaled(), True)
    reflects = need.u or need.v
    dz = dy
    if saved.z is not None:
        need_dz = bool(need.x or reflects or need.weight)
        dz, grad["u_out"], grad["v_out"] = stages.reflect_backward(dy, saved.z, saved.u_out, saved.v_out, need_dz)
    elif saved.u_out is not None:
        dz = stages.reflect(dy, saved.u_out, saved.v_out, None)
    if need.x or reflects:
        dx = dz if saved.weight is None else torch.mm(dz, dense(saved.weight, o.compute_dtype))
        if reflects:
            grad["x"], grad["u"], grad["v"] = stages.reflect_backward(dx, saved.x, saved.u, saved.v, bool(need.x))
        else:
            grad["x"] = dx if saved.u is None else stages.reflect(dx, saved.u, saved.v, None)
    if need.weight:
        into = saved.x if saved.u is None else stages.reflect(saved.x, saved.u, saved.v, None)
        grad["weight"] = stages.weight_grad(dz, into, None, 0.0, None)
    return grad


ReflectedLinear = differentiable("ReflectedLinear", ReflectCall, _Saved, _compute, _gradients)
"""y = H_out W H_in x + bias of one `ReflectCall`, and every gradient of it."""


def row_groups_reflected(weight: Tensor, u: Tensor, v: Tensor | None) -> Tensor:
    """W with row group i reflected by H_i in every column block, differentiable by autograd
    (blocks="official").

    As the authors' code does it, by reading W as N · blocks chunks in a row, N of them for each H:
    where blocks does not divide N, groups end within a row.
    """
    n, D = u.shape
    with torch.autocast(weight.device.type, enabled=False):
        dtype = accumulate_dtype(torch.promote_types(weight.dtype, u.dtype))
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
    adapted = weight.to(accumulate_dtype(dtype))
    if u is not None and blocks == "official" and u.shape[0] > 1:
        adapted = row_groups_reflected(adapted, u, v)
    elif u is not None:
        adapted = ops.reflect(adapted, u, v, None, "eager")
    if u_out is not None:
        adapted = ops.reflect(adapted.t(), u_out, v_out, None, "eager").t()
    return adapted
