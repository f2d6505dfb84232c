"""A whole call whose passes are on tape (backends/tape.py): its autograd Function, with nothing in
it but their replay.

The Function of `differentiable` is told a call and finds out what it is; this one is told a `Plan`,
which has found that out once. It keeps the same tensors in the same order: checkpointing may run a
call one way forward and the other again. A backward pass that asks for more than was recorded
(other strides of dy, second derivatives, batched gradients) goes the way of `differentiable`.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd import function
from delora_kernels.autograd.function import Kind
from delora_kernels.backends import loaded, tape
from delora_kernels.dtypes import allow_tf32

MOST_BACKWARD = 16
"""Kinds of gradients that one plan knows: beyond, all are forgotten."""

Replay = Callable[..., Any]
_PLAIN = {Tensor, torch.nn.Parameter}

unsafe_view: Callable[..., Tensor] = torch.ops.aten._unsafe_view.default
"""Of a tensor that nobody else holds: the same in another shape, to autograd a tensor of its own.
"""


class Plan:
    """What is known of calls of one kind: no tensor, no pointer.

    Args:
        family: The autograd Function of the calls.
        kind: Of the calls.
        device: Its type, and its index.
        forward: (stream, *tensors of the call) → `Computed`.
        stages: The backend's.
    """

    def __init__(self, family: Any, kind: Kind, device: tuple[str, int], forward: Replay, stages: Any) -> None:
        self.family, self.kind, self.forward, self.stages = family, kind, forward, stages
        self.device_type, self.device = device
        self.apply = _apply(family)
        self.trained = [place for place, need in enumerate(kind.need) if need]
        self.constant = family.family.constant
        keeps_output = getattr(kind.options, "save_output", False)
        self.leading = None if len(kind.shape) == 2 or keeps_output else kind.shape[:-1]
        self.wide = kind.options.rank_dtype == torch.float32
        self.backward: dict[Any, Replay] = {}

    def outputs(self, tensors: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """Run a call of this kind, the tokens of its x as rows where `leading` is None; None:
        launches are not as usual now.

        Args:
            tensors: Of the call, as its type has them.
        """
        stream = self.stages.begin(self.device)
        if stream is None:
            return None
        if self.trained:
            found = self.apply(self, stream, tensors, *[tensors[place] for place in self.trained])
            return found if type(found) is tuple else (found,)
        outputs, _, _ = self.computed(stream, tensors)
        return self.in_shape(outputs)

    def computed(self, stream: int, tensors: Sequence[Any]) -> Any:
        """Replay the forward pass."""
        if torch.is_autocast_enabled(self.device_type):
            return function.without_autocast(self.device_type, self.forward, stream, *tensors)
        return self.forward(stream, *tensors)

    def in_shape(self, outputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Return the outputs, the first with x's leading dimensions: a tensor of its own, no
        view.
        """
        if self.leading is None:
            return outputs
        y = outputs[0]
        return unsafe_view(y, (*self.leading, y.shape[-1])), *outputs[1:]

    def gradients(self, saved: Sequence[Any], douts: tuple[Tensor, ...], depends_on: Any) -> Sequence[Any]:
        """Return the gradient of each field of the call, by replay where that is known."""
        if self.leading is not None:
            dy = douts[0]  # reshape: of a batch of gradients, nothing else works
            douts = (dy.reshape(math.prod(self.leading), dy.shape[-1]), *douts[1:])
        odd = any([function.is_batched(each) or each.is_neg() for each in douts])  # noqa: C419, for torch 2.7
        if odd or torch.is_grad_enabled() or not function.unseen():
            return self._gradients_by_stages(saved, douts, depends_on)
        tensors = (*saved, *douts)
        key = tape.looks(tensors), self.wide and allow_tf32()
        known = self.backward.get(key)
        stream = None if known is None else self.stages.begin(self.device)
        if known is not None and stream is not None:
            grads: Sequence[Any] = function.without_autocast(self.device_type, known, stream, *tensors)
            return grads
        grads = self._gradients_by_stages(saved, douts, depends_on)
        found = tape.replay_of(function.backward_key(self.family.family, self.kind), tensors)
        if found is not None and all(type(each) in ops.PLAIN for each in tensors):
            if len(self.backward) >= MOST_BACKWARD:
                self.backward.clear()
            self.backward[key] = found[1]
        return grads

    def _gradients_by_stages(self, saved: Sequence[Any], douts: tuple[Tensor, ...], depends_on: Any) -> Sequence[Any]:
        return function.input_gradients(self.family.family, self.kind, None, saved, douts, depends_on)


@cache
def _apply(family: Any) -> Any:
    """Return `apply` of the Function, which profilers and graphs show by the name of the family's
    own: torch's, without the look for transforms that the plan's key has seen to.
    """
    made: Any = type(family.__name__, (_Replayed,), {"__module__": __name__})
    return super(torch.autograd.Function, made).apply


def facts_of(tensors: Iterable[Any]) -> list[Any] | None:
    """Return, in a row, all of these tensors that a call may depend on; None where one is no plain
    tensor with its own numbers in memory (torch's negative bit), or nothing is replayed.
    """
    if not tape.enabled:
        return None
    facts: list[Any] = []
    for t in tensors:
        if t is None:
            facts.append(None)
        elif t.__class__ not in _PLAIN or t.layout is not torch.strided or t.is_neg():
            return None
        else:
            facts += (t.__class__, t.dtype, t.device, t.shape, t.stride(), t.storage_offset() & 7, t.requires_grad)
    return facts


def is_any_planned() -> bool:
    """Whether any call is planned."""
    return bool(tape.calls)


def run(key: tuple[Any, ...], tensors: Sequence[Any]) -> tuple[Tensor, ...] | None:
    """Run a call whose kind is known; None of any other.

    Args:
        key: All that decides how it runs.
        tensors: Of the call, as its type has them.
    """
    plan: Plan | None = tape.calls.get(key)
    outputs = None if plan is None else plan.outputs(tensors)
    if outputs is None or outputs[0].dim() == tensors[0].dim():
        return outputs
    return outputs[0].view(*tensors[0].shape[:-1], outputs[0].shape[-1]), *outputs[1:]


def learn(key: tuple[Any, ...], family: Any, call: Any, backend: str) -> None:
    """Plan a call that just ran on a backend, once its forward pass is on tape."""
    stages = loaded[backend]
    if not hasattr(stages, "begin"):
        return
    with_grad = torch.is_grad_enabled() and function.any_requires_grad(call)
    need = tuple([with_grad and isinstance(each, Tensor) and each.requires_grad for each in call])
    found = tape.replay_of(function.forward_key(family.family, backend, call.options, need), call[:-1])
    if found is not None:
        device = call.x.device.type, found[0]
        tape.keep(key, Plan(family, function.kind_of(backend, call, need), device, found[1], stages))


def learn_again(key: tuple[Any, ...], known: tuple[Any, ...] | None) -> None:
    """Find what is planned under one key under another one, too."""
    plan = None if known is None else tape.calls.get(known)
    if plan is not None:
        tape.keep(key, plan)


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: Plan, stream: int, tensors: Sequence[Any], *trained: Tensor) -> Any:
        outputs, saved, ctx.depends_on = plan.computed(stream, tensors)
        ctx.plan = plan
        ctx.save_for_backward(*saved)
        if plan.leading is not None:
            outputs = plan.in_shape(outputs)
        if plan.constant is not None:
            ctx.mark_non_differentiable(outputs[plan.constant])
        return outputs if len(outputs) > 1 else outputs[0]

    @staticmethod
    def backward(ctx: Any, *douts: Tensor) -> tuple[Any, ...]:
        plan = ctx.plan
        grads = plan.gradients(ctx.saved_tensors, douts, ctx.depends_on)
        return None, None, None, *[grads[place] for place in plan.trained]
