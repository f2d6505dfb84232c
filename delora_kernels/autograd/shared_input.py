"""Several additive linears of one x as one call: x is read once for all their Â, dx is one buffer.

    h = drop(x) [Â₁; Â₂; ...]ᵀ            y_i = x W_iᵀ + s_i · h_i B̂_iᵀ + bias_i
    dx = Σ dy_i W_i + dv [Â₁; Â₂; ...]     dÂ = dvᵀ drop(x),      dv_i = s_i · dy_i B̂_i

In stages that a backend runs, each member's as low_rank_stages.py has them, or where only the
arithmetic of one dtype is left to do, in straight torch calls (shared_input_direct.py). DoRA's
columns are scaled, so that its dx takes a pass of its own: where one is among the members, and not
all are plain, they run one by one.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd import function
from delora_kernels.autograd.function import is_batched, refuse_second_derivatives
from delora_kernels.autograd.input_gradient import input_gradient
from delora_kernels.autograd.low_rank import AdaptedLinear, is_plain
from delora_kernels.autograd.low_rank_stages import (
    Saved,
    compute,
    folded_of,
    gradients_of_dy,
    gradients_of_factors,
    rows,
)
from delora_kernels.autograd.shared_input_direct import shared_direct
from delora_kernels.call import Call, Options
from delora_kernels.op_arguments import Branch, Masks

_FIELDS = Call._fields[1:-1]


def run_shared(calls: Sequence[Call], backend: str) -> tuple[Tensor, ...]:
    """Run calls of one x [..., K]: y_i [..., N_i] of each, differentiable once."""
    clamps = {call.options.eps for call in calls if call.lam is not None}
    if len(clamps) < 2 and all([is_plain(call, backend) for call in calls]):  # noqa: C419, for torch 2.7
        return shared_direct(calls)
    if not all([_shares(call, calls[0]) for call in calls]):  # noqa: C419
        return tuple(function.run(AdaptedLinear, call, backend, call.x.shape)[0] for call in calls)
    flat = [value for call in calls for value in call[1:-1]]
    x = calls[0].x
    outputs = _SharedInput.apply(backend, tuple(call.options for call in calls), x, *flat)
    return outputs if x.dim() == 2 else tuple(y.view(*x.shape[:-1], y.shape[-1]) for y in outputs)


def _shares(call: Call, first: Call) -> bool:
    o, o_first = call.options, first.options
    if (o.compute_dtype, o.rank_dtype) != (o_first.compute_dtype, o_first.rank_dtype):
        return False
    if call.magnitude is not None or o.frozen_rank or getattr(call.weight, "requires_grad", False):
        return False
    return call.A.requires_grad is first.A.requires_grad


class SharedKind(NamedTuple):
    """What a backward pass of linears of one x knows of them besides tensors.

    Args:
        backend: Name of the backend that ran them.
        options: Of each call.
        shape, dtype: Of their x.
        needs: Of each call: for each field, whether its gradient is wanted.
        wanted: For each field of the calls behind x, one call after the other, the dtype of its
            gradient; None where none is wanted.
    """

    backend: str
    options: tuple[Options, ...]
    shape: torch.Size
    dtype: torch.dtype
    needs: tuple[Call, ...]
    wanted: tuple[torch.dtype | None, ...]


def kind_of(backend: str, options: tuple[Options, ...], x: Tensor, flat: Sequence[Any], need: Sequence[bool]) -> Any:
    """Return the kind of calls of x whose other fields stand in `flat`; `need` is of x, then of
    these.
    """
    wanted = tuple([value.dtype if wanted else None for value, wanted in zip(flat, need[1:], strict=True)])
    return SharedKind(
        backend, options, x.shape, x.dtype, tuple(_members(need[0], need[1:], [False] * len(options))), wanted
    )


def forward_key(kind: SharedKind) -> tuple[Any, ...]:
    """Return all that decides what the forward pass does, besides its tensors."""
    return _key(_computed, kind)


class _SharedInput(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, backend: str, options: tuple[Options, ...], x: Tensor, *flat: Any) -> tuple[Tensor, ...]:
        calls = _members(x, flat, options)
        ctx.kind = kind = kind_of(backend, options, x, flat, ctx.needs_input_grad[2:])
        tensors = [each for each in (x, *flat) if each is None or isinstance(each, Tensor)]
        stages = ops.stages(backend, tensors)

        def found() -> tuple[list[Tensor], list[Saved], Tensor]:
            wide = x if x.dtype == options[0].compute_dtype else x.to(options[0].compute_dtype)
            return *_computed(calls, wide, kind.needs, stages), wide

        key = partial(forward_key, kind) if len(tensors) == 1 + len(flat) else None
        outputs, saved, wide = function.done(found, key, tuple(tensors), stages, x.device.type)
        ctx.depends_on = [each for call in calls for each in (call.A, call.B, call.lam)]
        ctx.stored = [None if isinstance(call.weight, Tensor) else call.weight for call in calls]
        saved = [m if base is None else m._replace(weight=None) for m, base in zip(saved, ctx.stored, strict=True)]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*kept_of(kind, saved, wide))
        return tuple(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Tensor | None) -> tuple[Any, ...]:
        saved = ctx.saved_tensors  # asked for once: checkpointing gives them out once
        return None, None, *input_gradients(ctx.kind, ctx.stored, saved, dys, ctx.depends_on)


def kept_of(kind: SharedKind, saved: Sequence[Saved], x: Tensor) -> list[Any]:
    """Return what is kept for backward, in a row: x, where a factor's gradient reads it, and each
    member's.
    """
    return [x if any([need.A for need in kind.needs]) else None, *[value for member in saved for value in member]]  # noqa: C419


def input_gradients(
    kind: SharedKind, stored: Sequence[Any], saved: Sequence[Any], dys: Sequence[Tensor | None], depends_on: Any
) -> tuple[Any, ...]:
    """Return the gradient of x and of each other field, None where none is wanted or none came
    back; differentiated again they raise.

    Args:
        kind: The calls'.
        stored: The stored base that stands for each member's weight, or None.
        saved: What was kept.
        dys: The outputs' gradients, [T, N_i], None where none came back.
        depends_on: Tensors that the gradients are computed from besides `saved`.
    """
    x, *flat = saved
    width = len(Saved._fields)
    members = [Saved(*flat[start : start + width]) for start in range(0, len(flat), width)]
    for i, base in enumerate(stored):
        if base is not None:
            members[i] = members[i]._replace(weight=base)
    found = [dy for dy in dys if dy is not None]
    if not found:
        return (None,) * (1 + len(kind.wanted))
    batched = not torch.compiler.is_compiling() and any(map(is_batched, found))
    inputs = (*dys, *saved)
    stages = ops.registered(kind.backend) if batched else ops.stages(kind.backend, inputs)
    key = None if any(base is not None for base in stored) else partial(backward_key, kind)

    def computed() -> tuple[Any, ...]:
        return _gradients(kind, x, members, dys, stages)

    with torch.no_grad():
        grads: tuple[Any, ...] = function.done(computed, key, inputs, stages, found[0].device.type)
    if not torch.is_grad_enabled():
        return grads
    return refuse_second_derivatives(kind.options[0].method, grads, (*found, *saved, *depends_on))


def backward_key(kind: SharedKind) -> tuple[Any, ...]:
    """Return all that decides what the backward pass does, besides its tensors."""
    return _key(_gradients, kind)


def _key(what: Any, kind: SharedKind) -> tuple[Any, ...]:
    return what, kind, function.products_in_tf32(kind.options[0])


def _members(x: Any, flat: Sequence[Any], options: Sequence[Any]) -> list[Call]:
    """Return the calls whose other fields stand in `flat`, one call after the other."""
    width = len(_FIELDS)
    return [Call._make((x, *flat[i * width : (i + 1) * width], o)) for i, o in enumerate(options)]


def _computed(calls: list[Call], x: Tensor, needs: Sequence[Call], stages: Any) -> tuple[list[Tensor], list[Saved]]:
    """Return y_i [T, N_i] and what is kept of each member besides x."""
    found = [folded_of(call, call.options, stages) for call in calls]
    A_hat = torch.cat([each[0] for each in found])
    widths = [len(each[0]) for each in found]
    masks = _masks([call.options for call in calls], widths, [call.seed for call in calls])
    parts = stages.project(rows(x), A_hat, masks).split(widths, dim=1)
    outputs, saved = [], []
    for call, each, h_i, need in zip(calls, found, parts, needs, strict=True):
        (y,), kept, _ = compute(call, x, need, stages, (*each, h_i))
        outputs.append(y)
        saved.append(kept._replace(x=None))
    return outputs, saved


def _masks(options: Sequence[Options], widths: Sequence[int], seeds: Sequence[Tensor | None]) -> Masks:
    """Return the masks of members of these ranks side by side."""
    dropping = [seed for seed in seeds if seed is not None]
    if not dropping:
        return Masks((), (0.0,), None)
    ranks: list[int] = []
    dropout_p: list[float] = []
    one_by_one: list[Tensor] = []
    for o, width, seed in zip(options, widths, seeds, strict=True):
        ranks += o.ranks or (width,)
        dropout_p += o.dropout_p if o.ranks else o.dropout_p[:1]
        count = len(o.ranks) or 1
        one_by_one.append(dropping[0].new_zeros(count) if seed is None else seed.reshape(-1))
    return Masks(tuple(ranks), tuple(dropout_p), torch.cat(one_by_one))


def _gradients(
    kind: SharedKind, x: Tensor | None, members: list[Saved], dys: Sequence[Tensor | None], stages: Any
) -> tuple[Any, ...]:
    flat: list[Any] = [None] * len(kind.wanted)
    live = [i for i, dy in enumerate(dys) if dy is not None]
    o, need = [kind.options[i] for i in live], [kind.needs[i] for i in live]
    member, dy = [members[i] for i in live], [dys[i] for i in live]
    given: Any = zip(o, need, member, [stages] * len(live), dy, strict=True)
    read = [gradients_of_dy(*each) for each in given]
    dx, dA_hats = _input_gradients(o, need[0], x, member, stages, dy, read)
    for place, i in enumerate(live):
        found, _, _, dB_hat = read[place]
        found.update(gradients_of_factors(o[place], need[place], member[place], stages, dA_hats[place], dB_hat))
        for at, field in enumerate(_FIELDS, i * len(_FIELDS)):
            if kind.wanted[at] is not None:
                flat[at] = found[field].to(kind.wanted[at])  # type: ignore[union-attr]
    return None if dx is None else dx.view(*dx.shape[:-2], *kind.shape).to(kind.dtype), *flat


def _input_gradients(
    o: Sequence[Options],
    need: Call,
    x: Tensor | None,
    member: Sequence[Saved],
    stages: Any,
    dy: Sequence[Any],
    read: Sequence[Any],
) -> tuple[Any, Sequence[Tensor | None]]:
    """dx [T, K] or None, and dÂ of each member, from one read of x."""
    if not need.x and x is None:
        return None, [None] * len(o)
    same = all([each.scale == o[0].scale for each in o])  # noqa: C419
    dvs = [dv if same else dv * each.scale for (_, dv, _, _), each in zip(read, o, strict=True)]
    widths = [dv.shape[-1] for dv in dvs]
    A_hat = torch.cat([found[2] for found in read]) if need.x else None
    branch = Branch(
        torch.cat(dvs, dim=-1), A_hat, None if x is None else rows(x), sum(widths), o[0].scale if same else 1.0
    )
    masks = _masks(o, widths, [each.seed for each in member])
    weights = [each.weight for each in member] if need.x else []
    dx, dA_hat = input_gradient(stages, dy, weights, o[0].compute_dtype, branch, masks)
    return dx if need.x else None, [None] * len(o) if x is None else dA_hat.split(widths, dim=-2)
