"""The autograd Function of mixtures of LoRA experts: the ops of low_rank.py with the gating in
between.

    [u | logits | u⁰] = [drop(x) Aᵀ | x Gᵀ | x A⁰ᵀ]        one read of x
    v = [w_te · s_e · u_te | u⁰],   w = top-k of softmax(logits)
    y = c ⊙ (x Wᵀ + v [B | −γ B⁰]ᵀ) + bias,   c: 1, or m / ‖W + Σ s_e B_e A_e / E − Σ γ_j B⁰_j A⁰_j‖

A weight [N, 0] stands for a base that has run already: y is the experts' term alone.

The experts stand side by side in the rank-R factors, so no token is sorted, gathered or scattered.
Kept: x (the caller's own tensor; under autocast its cast copy), [u | logits | u⁰], v, w, with a
magnitude one [T, N] tensor; the stacked factors are put together again in backward. Derivations:
docs/math.md.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels.autograd.function import Computed, differentiable, is_batched
from delora_kernels.backends.eager.route import route_backward
from delora_kernels.bases.plain import dense
from delora_kernels.call import MoECall, MoEOptions
from delora_kernels.op_arguments import (
    Branch,
    ExpertFactors,
    Frozen,
    Gated,
    Gating,
    Masks,
    RankTerm,
    Rescaled,
    Rescaling,
    TermGradients,
)

_PLAIN = Rescaling()  # made here: of a float that is a default, torch.compile makes an input of the graph


class _Factors(NamedTuple):
    """[A; G; A⁰] as [R_a + E + R₀, K] and [B | −γ B⁰] as [N, R + R₀], in one dtype, and how they
    are gated.
    """

    rows: Tensor
    columns: Tensor
    trained_rows: int
    gating: Gating


def _factors(stages: Any, of: Any, o: MoEOptions) -> _Factors:
    """Stack the factors of a call, or of what is kept of it."""
    (E, _, r), A_rows = of.B.shape, of.A.flatten(0, -2)
    alone = of.router is None and of.frozen_A is None and of.A.dtype == o.rank_dtype
    start = None if of.frozen_A is None else of.frozen_A.flatten(0, -2)
    factors = ExpertFactors(None if alone else A_rows, of.router, start, of.B, of.frozen_B, of.residual)
    rows, columns = stages.stack_factors(factors, o.rank_dtype)
    trained_rows = len(A_rows) + (0 if of.router is None else E)
    gating = Gating(E, r, o.renormalize, of.A.dim() == 2, of.scale, of.token_share)
    return _Factors(A_rows if alone else rows, columns, trained_rows, gating)


def mean_gate(of: Any) -> tuple[Tensor, Tensor]:
    """Return A [R, K] and B [N, R] whose product is what a mixture adds to W where every gate is
    1/E, in the dtype of its scales.
    """
    dtype, E = of.scale.dtype, of.B.shape[0]
    A, B = of.A.to(dtype), of.B.to(dtype) * (of.scale / E)[:, None, None]
    A, B = (A, B.sum(0)) if A.dim() == 2 else (A.flatten(0, 1), B.transpose(0, 1).flatten(1))
    if of.frozen_A is None:
        return A, B
    start = of.frozen_B.to(dtype) * (-of.residual)[:, None, None]
    return torch.cat([A, of.frozen_A.to(dtype).flatten(0, 1)]), torch.cat([B, start.transpose(0, 1).flatten(1)], dim=1)


class _Saved(NamedTuple):
    """The tensors kept for backward; None where no wanted gradient needs them."""

    x: Tensor | None
    weight: Any
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
    c: Tensor | None
    kept: Tensor | None
    norm: Tensor | None


def _compute(call: MoECall, x: Tensor, need: MoECall, stages: Any) -> Computed:
    """y [T, N]; over tokens f [E] (a constant), mean P [E], mean logsumexp² [1]."""
    o = call.options
    factors = _factors(stages, call, o)
    weight = dense(call.weight, o.compute_dtype)
    masks = Masks(o.ranks, o.dropout_p, call.seed)
    found = stages.project_route(x, factors.rows, masks, call.gates, o.top_k, factors.gating)
    h, v, w, fraction, probability, z = found
    norm = c = None
    if call.magnitude is not None:
        norm, c, _ = stages.row_norm(weight, *mean_gate(call), 1.0, call.magnitude, False)
    rescaling = _PLAIN if c is None else Rescaling(c, None, bool(need.magnitude))
    y, kept = stages.expand(x[:, : weight.shape[1]], weight, call.bias, RankTerm(v, factors.columns, 1.0), rescaling)
    saved = _Saved(
        x=x if need.A or need.router or need.weight else None,
        weight=call.weight if need.x else None,
        A=call.A,
        B=call.B,
        router=call.router,
        frozen_A=call.frozen_A,
        frozen_B=call.frozen_B,
        residual=call.residual,
        scale=call.scale,
        token_share=call.token_share,
        h=h,
        v=v if need.B or need.magnitude else None,
        w=w if call.gates is None else call.gates,
        fraction=fraction,
        balance_coef=call.balance_coef,
        z_coef=call.z_coef,
        seed=call.seed,
        c=c,
        kept=kept if need.magnitude else None,
        norm=norm if need.magnitude else None,
    )
    return Computed((y, fraction, probability, z), saved, (call.magnitude,))


def _gradients(
    o: MoEOptions, need: MoECall, saved: Any, stages: Any, dy: Tensor, _: Any, dP: Tensor, dz: Tensor
) -> dict[str, Any]:
    f, given = _factors(stages, saved, o), saved.router is None
    E, r, rows_of_A = f.gating.experts, f.gating.rank, saved.A.flatten(0, -2).shape[0]
    grad: dict[str, Any] = {}
    if need.x or need.A or need.router or need.gates or need.scale:
        if saved.balance_coef is not None:  # of balance_loss("code")
            dP = torch.addcmul(dP, saved.fraction, saved.balance_coef, value=E)
        if saved.z_coef is not None:
            dz = dz + saved.z_coef
        gated = Gated(saved.h, saved.w, given, dP, dz, bool(need.scale))
        dh, dB_hat, grad["bias"], grad["gates"], grad["scale"], grad["magnitude"] = _gradients_of_dy(
            need, saved, stages, dy, f, gated
        )
    else:
        term = TermGradients(saved.v, f.columns if need.magnitude else None, 1.0)
        rescaled = Rescaled(saved.c, saved.kept, False, saved.norm)
        _, dB_hat, grad["magnitude"], grad["bias"] = stages.expand_backward(dy, term, rescaled, bool(need.bias))
    if need.B:
        grad["B"] = dB_hat.narrow(1, 0, E * r).view(-1, E, r).transpose(0, 1)
    trains = need.A or need.router
    if need.x or trains:
        weight = dense(saved.weight, o.compute_dtype) if need.x else None
        if weight is not None and weight.shape[1] == 0:  # of a term alone: the frozen part of dx is no product
            dy, weight = dy[:, :0], weight.new_empty((0, f.rows.shape[1]))
        branch = Branch(dh, f.rows, saved.x if trains else None, f.trained_rows, 1.0)
        masks = Masks(o.ranks, o.dropout_p, saved.seed)
        grad["x"], trained = stages.input_backward(dy, Frozen(weight, saved.c), branch, masks)
        if trains:
            grad["A"] = trained.narrow(0, 0, rows_of_A).view(saved.A.shape)
            routed = trained.narrow(0, rows_of_A, f.trained_rows - rows_of_A)
            grad["router"] = routed.clone() if need.router else None  # of its own: an optimizer may keep either
    if need.weight:
        grad["weight"] = stages.weight_grad(dy, saved.x, saved.c, 0.0, None)
    return grad


def _gradients_of_dy(
    need: MoECall, saved: Any, stages: Any, dy: Tensor, f: _Factors, gated: Gated
) -> tuple[Any, Any, Any, Any, Any, Any]:
    """dh, dB̂, dbias, d gates, ds, dm; with a magnitude the gating is undone by torch's own
    operations, in rank space.
    """
    if saved.c is None:
        return *stages.expand_route_backward(dy, saved.v, f.columns, bool(need.bias), gated, f.gating), None
    term, rescaled = TermGradients(saved.v, f.columns, 1.0), Rescaled(saved.c, saved.kept, False, saved.norm)
    dv, dB_hat, dm, dbias = stages.expand_backward(dy, term, rescaled, bool(need.bias))
    if not torch.compiler.is_compiling() and is_batched(dy):  # which a registered op takes, and torch's in place don't
        columns = (f.columns * saved.c[:, None]).to(f.columns.dtype)
        dh, _, _, dgates, dscale = stages.expand_route_backward(dy, None, columns, False, gated, f.gating)
    else:
        dh, dgates, dscale = route_backward(dv, gated, f.gating)
    return dh, dB_hat, dbias, dgates, dscale, dm


MoELinear = differentiable("MoELinear", MoECall, _Saved, _compute, _gradients, constant=1)
"""The results of one `MoECall`, and every gradient of them."""


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
