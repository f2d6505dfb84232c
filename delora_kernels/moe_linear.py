"""The autograd Function of mixtures of LoRA experts: the stages of `adapted_linear.py` with the gating in between.

    [u | logits | u⁰] = [drop(x) Aᵀ | x Gᵀ | x A⁰ᵀ]        one read of x
    v = [w_te · s_e · u_te | u⁰],   w = top-k of softmax(logits)
    y = x Wᵀ + v [B | −γ B⁰]ᵀ + bias

The experts stand side by side in the rank-R factors, so no token is sorted, gathered or scattered. Kept: x (the
caller's own tensor; under autocast its cast copy), [u | logits | u⁰], v, w; the stacked factors are put together again
in backward. Derivations: docs/math.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.adapted_linear import refuse_second_derivatives
from delora_kernels.call import MoECall
from delora_kernels.frozen import FrozenLinear


class MoEOutputs(NamedTuple):
    """y [T, N]; over tokens: f [E] (a constant), mean P [E], mean logsumexp² [1]."""

    y: Tensor
    fraction: Tensor
    probability: Tensor
    z: Tensor


def run(call: MoECall) -> MoEOutputs:
    """The results of `call`, differentiable once where a tensor of it requires grad."""
    if torch.is_grad_enabled():
        for value in call:
            if isinstance(value, Tensor) and value.requires_grad:
                return MoEOutputs(*MoELinear.apply(*call))
    return _forward(call).outputs


class _Factors(NamedTuple):
    """[A; G; A⁰] as [R_a + E + R₀, K] and [B | −γ B⁰] as [N, R + R₀], in one dtype, and the sizes of their parts."""

    rows: Tensor
    columns: Tensor
    experts: int
    rank: int
    trained_rows: int
    shared: bool


def _factors(
    stages: Any,
    A: Tensor,
    B: Tensor,
    router: Tensor | None,
    frozen_A: Tensor | None,
    frozen_B: Tensor | None,
    residual: Tensor | None,
    dtype: torch.dtype,
) -> _Factors:
    (E, _, r), A_rows = B.shape, A.flatten(0, -2)
    alone = router is None and frozen_A is None and A.dtype == dtype
    start = None if frozen_A is None else frozen_A.flatten(0, -2)
    rows, columns = stages.stack_factors(None if alone else A_rows, router, start, B, frozen_B, residual, dtype)
    trained_rows = len(A_rows) + (0 if router is None else E)
    return _Factors(A_rows if alone else rows, columns, E, r, trained_rows, A.dim() == 2)


class _Stages(NamedTuple):
    """What the forward pass computed."""

    outputs: MoEOutputs
    x: Tensor
    h: Tensor
    v: Tensor
    w: Tensor


def _forward(call: MoECall) -> _Stages:
    device = call.x.device.type
    if torch.is_autocast_enabled(device):  # the options hold every dtype
        with torch.autocast(device, enabled=False):
            return _forward(call)
    o = call.options
    x = call.x.to(o.compute_dtype)
    weight = FrozenLinear(call.weight).dense(o.compute_dtype)
    stages = ops.stages(o.backend, call.tensors)
    f = _factors(stages, call.A, call.B, call.router, call.frozen_A, call.frozen_B, call.residual, o.rank_dtype)
    h, v, w, fraction, probability, z = stages.project_route(
        x,
        f.rows,
        o.ranks,
        o.dropout_p,
        call.seed,
        call.gates,
        call.scale,
        call.token_share,
        f.experts,
        f.rank,
        o.top_k,
        o.renormalize,
        f.shared,
    )
    y, _ = stages.expand(x, weight, call.bias, v, f.columns, 1.0, None, None, False, 0.0, None)
    w = w if call.gates is None else call.gates
    return _Stages(MoEOutputs(y, fraction, probability, z), x, h, v, w)


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    weight: Tensor | None
    A: Tensor
    B: Tensor
    router: Tensor | None
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    residual: Tensor | None
    scale: Tensor
    token_share: Tensor | None
    h: Tensor
    v: Tensor | None
    w: Tensor
    fraction: Tensor
    balance_coef: Tensor | None
    z_coef: Tensor | None
    seed: Tensor | None


class MoELinear(torch.autograd.Function):
    """The results of one `MoECall`, and every gradient of them."""

    @staticmethod
    def forward(ctx: Any, *inputs: Any) -> tuple[Tensor, ...]:
        call = MoECall(*inputs)
        need = MoECall(*ctx.needs_input_grad)
        s = _forward(call)
        saved = _Saved(
            x=s.x if need.A or need.router or need.weight else None,
            weight=call.weight if need.x else None,
            A=call.A,
            B=call.B,
            router=call.router,
            frozen_A=call.frozen_A,
            frozen_B=call.frozen_B,
            residual=call.residual,
            scale=call.scale,
            token_share=call.token_share,
            h=s.h,
            v=s.v if need.B else None,
            w=s.w,
            fraction=s.outputs.fraction,
            balance_coef=call.balance_coef,
            z_coef=call.z_coef,
            seed=call.seed,
        )
        ctx.save_for_backward(*saved)
        ctx.mark_non_differentiable(s.outputs.fraction)
        ctx.options, ctx.given = call.options, call.gates is not None
        ctx.wanted = [
            (name, value.dtype if wanted else None)
            for name, value, wanted in zip(MoECall._fields, inputs, ctx.needs_input_grad, strict=True)
        ]
        return tuple(s.outputs)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Any, dP: Tensor, dz: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        if not torch.is_grad_enabled():
            return _gradients(ctx, dy, dP, dz, _Saved(*saved))
        with torch.no_grad():
            grads = _gradients(ctx, dy, dP, dz, _Saved(*saved))
        return refuse_second_derivatives(ctx.options.method, grads, (dy, dP, dz, *saved))


class ZeroGradient(torch.autograd.Function):
    """The first tensor as it is; the second, which has no part in it, gets a gradient of zeros.

    A router that is not run still gets a gradient, so that DDP finds every parameter used.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, unused: Tensor) -> Tensor:
        ctx.save_for_backward(unused)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        return grad, torch.zeros_like(ctx.saved_tensors[0])


def _gradients(ctx: Any, dy: Tensor, dP: Tensor, dz: Tensor, saved: Any) -> tuple[Tensor | None, ...]:
    """The gradient of every input of the Function that wants one, in its dtype."""
    if torch.is_autocast_enabled(dy.device.type):
        with torch.autocast(dy.device.type, enabled=False):
            return _gradients(ctx, dy, dP, dz, saved)
    need, o = MoECall(*ctx.needs_input_grad), ctx.options
    stages = ops.stages(o.backend, (dy, dP, dz, *saved))
    f = _factors(stages, saved.A, saved.B, saved.router, saved.frozen_A, saved.frozen_B, saved.residual, o.rank_dtype)
    E, R, Ra = f.experts, f.experts * f.rank, saved.A.flatten(0, -2).shape[0]
    grad: dict[str, Any] = {}
    if need.x or need.A or need.router or need.gates or need.scale:
        if saved.balance_coef is not None:  # of balance_loss("code")
            dP = torch.addcmul(dP, saved.fraction, saved.balance_coef, value=E)
        if saved.z_coef is not None:
            dz = dz + saved.z_coef
        dh, dB_hat, grad["bias"], grad["gates"], grad["scale"] = stages.expand_route_backward(
            dy,
            saved.v,
            f.columns,
            bool(need.bias),
            saved.h,
            saved.w,
            saved.scale,
            saved.token_share,
            dP,
            dz,
            bool(need.scale),
            ctx.given,
            E,
            f.rank,
            o.renormalize,
            f.shared,
        )
    else:
        _, dB_hat, _, grad["bias"] = stages.expand_backward(
            dy, saved.v, None, 1.0, None, None, False, None, bool(need.bias)
        )
    if need.B:
        grad["B"] = dB_hat[:, :R].unflatten(1, (E, f.rank)).transpose(0, 1)
    trains = need.A or need.router
    if need.x or trains:
        grad["x"], trained = stages.input_backward(
            dy,
            FrozenLinear(saved.weight).dense(o.compute_dtype) if need.x else None,
            dh,
            f.rows,
            saved.x if trains else None,
            f.trained_rows,
            1.0,
            None,
            o.ranks,
            o.dropout_p,
            saved.seed,
            False,
        )
        if trains:
            grad["A"], grad["router"] = trained[:Ra].view(saved.A.shape), trained[Ra:]
    if need.weight:
        grad["weight"] = stages.weight_grad(dy, saved.x, None, 0.0, None)
    return tuple(None if dtype is None else grad[name].to(dtype) for name, dtype in ctx.wanted)
