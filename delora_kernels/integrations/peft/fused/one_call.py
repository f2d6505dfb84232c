"""A layer's call, read but not run: of such calls a group makes one (groups.py).

There are two kinds, as there are two ways to judge a layer: at one look (straight.py), which knows
that only arithmetic is left to do, and by plan.py, whose calls check, choose dtypes and a backend.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from delora_kernels.autograd.function import unseen
from delora_kernels.bases.stored import StoredBase
from delora_kernels.call import Call
from delora_kernels.functional.common import run_linears
from delora_kernels.functional.planned import linears_at_a_glance
from delora_kernels.functional.straight import run_shared, run_straight


class StraightCall:
    """A call that was read at one look."""

    __slots__ = ("call",)

    def __init__(self, call: Call) -> None:
        self.call = call

    def inputs(self) -> tuple[Any, ...]:
        """Return all that it is made of besides x."""
        return self.call[1:]

    @staticmethod
    def facts(inputs: Sequence[Any]) -> list[Any]:
        """Return what was read of the tensors among `inputs`, and may change where they stay the
        same: an assignment to .data moves no version.
        """
        tensors = [each for each in inputs[:-1] if each is not None]
        return [(t._version, t.data_ptr(), t.requires_grad, t.dtype, t.shape) for t in tensors if not t.is_inference()]

    def run(self) -> Tensor:
        """Return the layer's output."""
        return run_straight(self.call)

    @staticmethod
    def of(layer: Any, x: Tensor) -> "StraightCall | None":
        """Read the call of a sibling."""
        read = getattr(type(layer), "read_call", None)
        call = None if read is None else read(layer, x, looked=True)
        return None if call is None else StraightCall(call)

    @staticmethod
    def together(calls: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run calls of one x."""
        return run_shared([each.call for each in calls])

    @staticmethod
    def may_share(x: Tensor) -> bool:
        """Whether nothing stands in the way of running calls of x together."""
        return True


@dataclass(frozen=True)
class PlannedRun:
    """x → y of a layer that is one call of a public function.

    Args:
        function: The function.
        make: Makes its call of the same arguments without running it.
        arguments: All but x, by name.
        keeps_dtype: Whether the output comes in x's dtype under autocast too, as of PEFT's DeLoRA.
    """

    function: Callable[..., Tensor]
    make: Callable[..., Any]
    arguments: Mapping[str, Any]
    keeps_dtype: bool = False

    def __call__(self, x: Tensor) -> Tensor:
        return self.finish(self.function(x, **self.arguments), x)

    def parts(self) -> tuple[str, tuple[Any, ...], Any, tuple[Any, ...]]:
        """Return its name, its tensors in a `Call`'s order, its dropout, its other numbers."""
        given = self.arguments
        tensors: tuple[Any, ...] = given["weight"], given["bias"], given["A"], given["B"]
        if "lam" in given:
            tensors += None, given["lam"], given["weight_norm"]
        numbers = (given["scale"],) if "scale" in given else ()
        return self.function.__name__, tensors, given["dropout_p"], numbers

    def finish(self, y: Tensor, x: Tensor) -> Tensor:
        """Return the layer's output of what the function gave."""
        return y.to(x.dtype) if self.keeps_dtype else y


@dataclass(frozen=True)
class PlannedCall:
    """A call that was planned."""

    planned: PlannedRun
    x: Tensor

    def inputs(self) -> tuple[Any, ...]:
        """Return all that it is made of besides x."""
        return (*self.planned.arguments.values(), self.planned.function)

    @staticmethod
    def facts(inputs: Sequence[Any]) -> list[Any]:
        """Return the versions of the tensors among `inputs`, and where they are."""
        tensors = [each for each in inputs if isinstance(each, Tensor) and not each.is_inference()]
        return [(each._version, each.data_ptr()) for each in tensors]

    def run(self) -> Tensor:
        """Return the layer's output."""
        return self.planned(self.x)

    @staticmethod
    def of(layer: Any, x: Tensor) -> "PlannedCall | None":
        """Read the call of a sibling."""
        read = getattr(layer, "read_plan", None)
        planned = None if read is None else read(x)
        return None if planned is None else PlannedCall(planned, x)

    @staticmethod
    def together(calls: Sequence[Any]) -> tuple[Tensor, ...]:
        """Run calls of one x."""
        x = calls[0].x
        key, outputs = linears_at_a_glance(x, [each.planned.parts() for each in calls])
        if outputs is None:
            made = [each.planned.make(x, **each.planned.arguments) for each in calls]
            outputs = run_linears(made, x.shape, key)
        return tuple(each.planned.finish(y, x) for each, y in zip(calls, outputs, strict=True))

    @staticmethod
    def may_share(x: Tensor) -> bool:
        """Whether nothing stands in the way of running calls of x together."""
        return x.dim() > 1 and unseen()


def same_inputs(was: Sequence[Any], now: Sequence[Any]) -> bool:
    """Whether two calls are made of the same: tensors by identity, stored bases, which are read
    anew at each call, by what they hold.
    """
    if len(was) != len(now):
        return False
    for a, b in zip(was, now, strict=True):
        if a is b:
            continue
        if isinstance(a, Tensor) or not (_holds_the_same(a, b) if isinstance(a, StoredBase) else a == b):
            return False
    return True


def _holds_the_same(a: Any, b: Any) -> bool:
    if a is b:
        return True
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.data_ptr() == b.data_ptr() and a.shape == b.shape and a.dtype == b.dtype
    if isinstance(a, StoredBase):
        return _holds_the_same(vars(a), vars(b))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_holds_the_same(value, b[name]) for name, value in a.items())
    return bool(a == b)
