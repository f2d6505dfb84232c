"""Several linears of one x whose passes are on tape: their autograd Function, with nothing in it
but their replay.

What autograd/replayed.py is to one call, this is to those that shared_input.py runs as one: it
keeps the same tensors in the same order, and a backward pass that asks for more than was recorded
goes the way of shared_input.py.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.autograd import function, replayed, shared_input
from delora_kernels.autograd.shared_input import SharedKind
from delora_kernels.backends import loaded, tape
from delora_kernels.call import Call
from delora_kernels.dtypes import allow_tf32

_FACTORS = tuple([Call._fields.index(name) - 1 for name in ("A", "B", "lam")])
"""Places behind x, in each member's fields, of what is trained."""


class SharedPlan:
    """What is known of linears of one x of one kind: no tensor, no pointer.

    Args:
        kind: Of the calls.
        device: Its type, and its index.
        forward: (stream, x, *other fields of each call) → outputs, what is kept, x as it is read.
        stages: The backend's.
    """

    def __init__(self, kind: SharedKind, device: tuple[str, int], forward: replayed.Replay, stages: Any) -> None:
        self.kind, self.forward, self.stages = kind, forward, stages
        self.device_type, self.device = device
        need = [kind.needs[0].x, *[dtype is not None for dtype in kind.wanted]]
        self.trained = [place for place, each in enumerate(need) if each]
        width = len(Call._fields) - 2
        count = len(kind.options)
        self.depends_on = [1 + i * width + place for i in range(count) for place in _FACTORS]
        self.stored = [None] * count
        self.leading = None if len(kind.shape) == 2 else kind.shape[:-1]
        self.wide = kind.options[0].rank_dtype == torch.float32
        self.backward: dict[Any, replayed.Replay] = {}

    def outputs(self, tensors: Sequence[Any]) -> tuple[Tensor, ...] | None:
        """Run calls of this kind: y_i [..., N_i]; None: launches are not as usual now.

        Args:
            tensors: x, then the other fields of each call.
        """
        stream = self.stages.begin(self.device)
        if stream is None:
            return None
        if self.trained and torch.is_grad_enabled():
            found: tuple[Tensor, ...] = _apply(self, stream, tensors, *[tensors[place] for place in self.trained])
            return found
        return self.in_shape(self.computed(stream, tensors)[0])

    def computed(self, stream: int, tensors: Sequence[Any]) -> Any:
        """Replay the forward pass."""
        return function.without_autocast(self.device_type, self.forward, stream, *tensors)

    def in_shape(self, outputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the outputs with x's leading dimensions: tensors of their own, no views."""
        if self.leading is None:
            return tuple(outputs)
        return tuple([replayed.unsafe_view(y, (*self.leading, y.shape[-1])) for y in outputs])

    def gradients(self, saved: Sequence[Any], dys: Sequence[Any], depends_on: Sequence[Any]) -> Sequence[Any]:
        """Return the gradient of x and of each other field, by replay where that is known."""
        if self.leading is not None:
            T = math.prod(self.leading)
            dys = [None if dy is None else dy.reshape(T, dy.shape[-1]) for dy in dys]
        found = [dy for dy in dys if dy is not None]
        odd = any([function.is_batched(each) or each.is_neg() for each in found])  # noqa: C419, for torch 2.7
        if not found or odd or torch.is_grad_enabled() or not function.unseen():
            return shared_input.input_gradients(self.kind, self.stored, saved, dys, depends_on)
        tensors = (*dys, *saved)
        key = tape.looks(tensors), self.wide and allow_tf32()
        known = self.backward.get(key)
        stream = None if known is None else self.stages.begin(self.device)
        if known is not None and stream is not None:
            grads: Sequence[Any] = function.without_autocast(self.device_type, known, stream, *tensors)
            return grads
        grads = shared_input.input_gradients(self.kind, self.stored, saved, dys, depends_on)
        replay = tape.replay_of(shared_input.backward_key(self.kind), tensors)
        if replay is not None and all(each is None or type(each) in ops.PLAIN for each in tensors):
            if len(self.backward) >= replayed.MOST_BACKWARD:
                self.backward.clear()
            self.backward[key] = replay[1]
        return grads


def learn(key: tuple[Any, ...], calls: Sequence[Call], backend: str) -> None:
    """Plan linears of one x that just ran on a backend, once their forward pass is on tape."""
    stages, x = loaded[backend], calls[0].x
    if not hasattr(stages, "begin"):
        return
    flat = [value for call in calls for value in call[1:-1]]
    tensors = (x, *flat)
    need = [isinstance(each, Tensor) and each.requires_grad for each in tensors]
    kind = shared_input.kind_of(backend, tuple(call.options for call in calls), x, flat, need)
    found = tape.replay_of(shared_input.forward_key(kind), tensors)
    if found is not None:
        tape.keep(key, SharedPlan(kind, (x.device.type, found[0]), found[1], stages))


class SharedInputReplayed(torch.autograd.Function):
    """y_i of linears of one x, by replay."""

    @staticmethod
    def forward(ctx: Any, plan: SharedPlan, stream: int, tensors: Sequence[Any], *trained: Tensor) -> Any:
        outputs, saved, wide = plan.computed(stream, tensors)
        ctx.plan, ctx.depends_on = plan, [tensors[place] for place in plan.depends_on]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*shared_input.kept_of(plan.kind, saved, wide))
        return plan.in_shape(outputs)

    @staticmethod
    def backward(ctx: Any, *dys: Any) -> tuple[Any, ...]:
        plan = ctx.plan
        grads = plan.gradients(ctx.saved_tensors, dys, ctx.depends_on)
        return None, None, None, *[grads[place] for place in plan.trained]


_apply: Any = super(torch.autograd.Function, SharedInputReplayed).apply
"""Torch's, without the look for transforms that the plan's key has seen to."""
