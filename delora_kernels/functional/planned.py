"""Whole calls of kernels that were made before: found at one look, and replayed.

What a call decides (dtypes, backend, forms, launches, what is kept) it decides once for each kind,
from nothing but what `key_of` reads: the tensors' class, dtype, device, shape, strides and
requires_grad, the options, the grad mode, the backend asked for. Where somebody watches what torch
computes (a compiler, a mode, a transform), or other than plain tensors come, no call is planned;
nor is one on a CPU that asks for no backend, for eager calls have no launches to replay: callers
see to that, where another file on the way of each call costs what it saves.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delora_kernels import dispatch
from delora_kernels.autograd import function, replayed
from delora_kernels.autograd.low_rank import AdaptedLinear
from delora_kernels.call import Call
from delora_kernels.dtypes import allow_tf32


def key_of(what: Any, tensors: Sequence[Any], numbers: Any) -> tuple[Any, ...] | None:
    """Return all that decides how a call runs, or None: it is not to be planned.

    Args:
        what: Its autograd Function; or the name of the public function, of arguments that are not
            checked yet.
        tensors: Of the call, x first.
        numbers: All else.
    """
    if not function.unseen() or dispatch.is_proving():
        return None
    requested = dispatch.requested()
    facts = replayed.facts_of(tensors)
    if facts is None:
        return None
    # factors of both 16-bit dtypes are float32 together
    wide = torch.float32 in facts or torch.float32 in numbers or (torch.float16 in facts and torch.bfloat16 in facts)
    wide = wide and allow_tf32()
    return what, requested, torch.is_grad_enabled(), wide, numbers, *facts


def may_be_planned(x: Tensor) -> bool:
    """Whether a call of x may be among those that are planned."""
    return (x.is_cuda or dispatch._requested is not None) and replayed.is_any_planned()


def at_a_glance(
    name: str, tensors: tuple[Any, ...], dropout_p: Any, *numbers: Any
) -> tuple[tuple[Any, ...] | None, Tensor | None]:
    """Run a call of a low-rank function by its unchecked arguments, where one of the very same kind
    has passed every check: they look at nothing but what the key holds.

    Args:
        name: Of the function.
        tensors: As in `Call`, but for those behind the last, which are None.
        dropout_p: Where it is not 0.0, the call is to be made.
        numbers: All other arguments; what the function does not hand in is at its default.

    Returns:
        The key, None where there is none; and y, None where the call has to be made.
    """
    autocast = _autocast(tensors[0], (dropout_p, *numbers))
    if autocast is _NEVER:
        return None, None
    key = key_of(name, tensors, (autocast, *numbers))
    outputs = None if key is None else replayed.run(key, tensors + _NOTHING[len(tensors) :])
    return key, None if outputs is None else outputs[0]


def linears_at_a_glance(
    x: Any, members: Sequence[tuple[str, tuple[Tensor | None, ...], Any, tuple[Any, ...]]]
) -> tuple[tuple[Any, ...] | None, tuple[Tensor, ...] | None]:
    """Run linears of one x by their unchecked arguments, as `at_a_glance` runs one.

    Args:
        x: Their input.
        members: Of each the name of its function, its tensors behind x, `dropout_p`, all other
            arguments.

    Returns:
        The key, None where there is none; and y_i, None where the calls have to be made.
    """
    if dispatch._requested is None and getattr(x, "is_cpu", True):
        return None, None
    tensors: tuple[Any, ...] = (x,)
    numbers: list[Any] = []
    for name, own, dropout_p, others in members:
        autocast = _autocast(x, (dropout_p, *others))
        if autocast is _NEVER:
            return None, None
        tensors += own + _NOTHING[len(own) + 1 :]
        numbers += (name, autocast, *others)
    key = key_of("linears", tensors, tuple(numbers))
    return key, None if key is None else replayed.run(key, tensors)


def _autocast(x: Any, numbers: tuple[Any, ...]) -> Any:
    """Return the dtype that autocast casts x to, or None; `_NEVER` where a call is not planned.

    Args:
        x: Its input: a meta tensor has no autocast, and one row without a dimension for it is
            planned as a matrix.
        numbers: All its numbers, its dropout first.
    """
    for number in numbers:
        if number.__class__ is not float:
            return _NEVER
    device = x.device.type if isinstance(x, Tensor) else ""
    if numbers[0] != 0.0 or device not in _DEVICES or x.dim() < 2:
        return _NEVER
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None


_NEVER = object()
_DEVICES = ("cpu", "cuda")
_NOTHING = (None,) * (len(Call._fields) - 1)


def learn_glance(key: Any, call: Call) -> None:
    """Find a call at a glance from now on, if it is planned.

    Args:
        key: What `at_a_glance` returned.
        call: What was made of the arguments.
    """
    replayed.learn_again(key, key_of(AdaptedLinear, call[:-1], call.options))
