"""Siblings that are given the same x (q, k, v; gate, up) run as one call.

The fused layers of one parent module are a family. Its first forward pass is watched: layers that
were given the same tensor, one after the other, are a group from then on. The first of a group is
its leader: its call computes the outputs of all, and each of the others, when it is called with
that very x in the same surroundings, is handed its own; whatever does not fit runs alone. Names
play no part, nor does what a model's source looks like.

Grouped and single calls keep different tensors for backward, and differ by rounding; checkpointing
runs a forward pass a second time and must find what the first left. So a group begins only where no
earlier forward pass can be run again (outstanding.py); from then on whether a call is shared
follows from what the call is, which is the same the second time. One thing is not: a mode that
watches torch's calls makes a pass run alone, and may be gone when it is run again.
"""

import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.compiler import is_compiling

from delora_kernels.autograd.function import unseen
from delora_kernels.call import Call
from delora_kernels.functional.straight import run_straight, surroundings, unwatched
from delora_kernels.integrations.peft.fused.look import are_plain
from delora_kernels.integrations.peft.fused.one_call import PlannedCall, PlannedRun, StraightCall, same_inputs
from delora_kernels.integrations.peft.fused.outstanding import Outstanding, in_backward

PLACE = "_shared_input"
"""Where a layer keeps its `Place`: in its __dict__, which no state dict reads."""


class Place:
    """A layer's place in its family; without a group, it runs alone."""

    def __init__(self, family: "Family") -> None:
        self.family = family
        self.group: Group | None = None

    def __reduce__(self) -> Any:
        return Place, (self.family,)

    def run(self, layer: nn.Module, x: Tensor, call: StraightCall | PlannedCall) -> Tensor:
        """Run the call of `layer`, with its siblings' where they share x."""
        family = self.family
        if self.group is not None and _held.group is self.group:
            y = _held.take(layer, x, call)
            if y is not None:
                return y
        if family.watched:
            family.note(layer, x)
        if self.group is not None and self.group.led_by(layer):
            if _held.group is self.group:  # what is left of its last call, nobody will call for
                _held.drop()
            self.group.leave_out_the_missed()
            if self.group is not None and family.may_share(self.group):
                calls = self.group.calls(layer, x, call)
                if calls is not None:
                    return _together(self.group, x, calls)
        y = call.run()
        if self.group is not None or family.watched:
            family.ran_alone(layer, y)
        return y

    def ran_alone(self, layer: nn.Module, y: Tensor) -> None:
        """Take note of a call that was computed in another way than by `run`."""
        if self.group is not None:
            self.family.ran_alone(layer, y)


class Family:
    """The fused layers of one parent module: which of them share an input, and which forward passes
    ran without a group.

    Copied or unpickled with its layers, it is watched anew.
    """

    def __init__(self, watched: bool = True) -> None:
        self.alone = Outstanding()
        self.watched = watched
        self._under_a_mode = Outstanding()
        self._runs: list[list[Any]] = []  # layers given one x, as weak references; the last run is under way
        self._x: Any = None
        self._version = 0
        self._lock = threading.Lock()

    def __deepcopy__(self, memo: dict[int, Any]) -> "Family":
        memo[id(self)] = copy = Family()
        return copy

    def __reduce__(self) -> Any:
        return Family, ()

    def may_share(self, group: "Group") -> bool:
        """Whether a call of all is what any pass that is run again now has run."""
        return (group.began or self.alone.is_over()) and self._under_a_mode.is_over()

    def ran_alone(self, layer: nn.Module, y: Tensor) -> None:
        """Take note of a call without a group."""
        self.alone.add(layer, y)
        if not unseen():
            self._under_a_mode.add(layer, y)

    def note(self, layer: nn.Module, x: Tensor) -> None:
        """Watch one call; where a layer comes round again, the family's groups are known."""
        if in_backward() or x.is_inference():
            return
        with self._lock:
            same = self._x is not None and self._x() is x and self._version == x._version
            if any(ref() is layer for run in self._runs for ref in run):
                self._settle()
            elif same:
                self._runs[-1].append(weakref.ref(layer))
            elif self.watched:
                self._x, self._version = weakref.ref(x), x._version
                self._runs.append([weakref.ref(layer)])

    def _settle(self) -> None:
        runs = [[layer for ref in run if (layer := ref()) is not None and self._holds(layer)] for run in self._runs]
        self.watched, self._runs, self._x = False, [], None
        for run in runs:
            if len(run) > 1:
                form(run)
            else:
                self.alone.forget(run)
                for layer in run:
                    layer.__dict__.pop(PLACE, None)

    def _holds(self, layer: nn.Module) -> bool:
        """Whether a layer still has its place here: restore() takes it away."""
        place = place_of(layer)
        return place is not None and place.family is self


class Group:
    """Layers that share an input, in the order of their calls, held weakly.

    Attributes:
        began: Whether they have run as one call.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self.began = False
        self._layers = [weakref.ref(layer) for layer in layers]
        self._missed: weakref.WeakSet[nn.Module] = weakref.WeakSet()
        self._ran = Outstanding()

    def layers(self) -> list[Any]:
        """Return the layers; fewer where one is gone."""
        return [layer for ref in self._layers if (layer := ref()) is not None]

    def led_by(self, layer: nn.Module) -> bool:
        """Whether `layer` is the first of them."""
        return self._layers[0]() is layer

    def calls(self, leader: nn.Module, x: Tensor, call: Any) -> dict[Any, Any] | None:
        """Read the calls of all, the leader's given; None where one of them can't share."""
        # an inference tensor has no version, by which the others know it
        if x.is_inference() or not are_plain(leader) or not call.may_share(x):
            return None
        found: dict[Any, Any] = {leader: call}
        for ref in self._layers[1:]:
            layer: Any = ref()
            other = call.of(layer, x) if layer is not None and are_plain(layer) else None
            if other is None:
                return None
            found[layer] = other
        return found

    def ran(self, leader: nn.Module, y: Tensor) -> None:
        """Take note of a call of all."""
        self.began = True
        if self._missed:  # to leave them out waits for it
            self._ran.add(leader, y)

    def miss(self, unclaimed: Mapping[Any, "_Output"]) -> None:
        """Remember layers whose outputs nobody called for."""
        if not in_backward():  # where checkpointing stops as soon as it has what it needs
            for layer, held in unclaimed.items():
                self._missed.add(layer)
                self._ran.add(layer, held.y)

    def leave_out_the_missed(self) -> None:
        """Go on without them, as soon as no forward pass that ran with them can be run again."""
        if self._missed and not in_backward() and self._ran.is_over():
            places = [(layer, place_of(layer)) for layer in self.layers()]
            here = [(layer, place) for layer, place in places if place is not None and place.group is self]
            for _, place in here:
                place.group = None
            left = [layer for layer, _ in here if layer not in self._missed]
            if len(left) > 1:
                form(left)


class _Output(NamedTuple):
    """What is held for a layer: how its call was read, what it is made of besides x, what was true
    of these tensors, its y.
    """

    kind: Any
    inputs: tuple[Any, ...]
    facts: list[Any]
    y: Tensor


class _Held(threading.local):
    """Outputs of this thread's last group call that nobody has called for yet."""

    group: Group | None = None
    _x: Any = None
    _around: tuple[Any, ...] = ()
    _outputs: dict[Any, _Output] = {}  # noqa: RUF012, only ever replaced

    def put(self, group: Group, x: Tensor, outputs: dict[Any, _Output]) -> None:
        self.group, self._around, self._outputs = group, surroundings(x), outputs
        self._x = weakref.ref(x, lambda _: _let_go(group, outputs))

    def take(self, layer: nn.Module, x: Tensor, call: StraightCall | PlannedCall) -> Tensor | None:
        """Return the output of `layer` if it is what its call would compute now; once."""
        held = self._outputs.get(layer)
        if held is None or self._x() is not x or self._around != surroundings(x):
            return None
        # with a leader that was planned, all were: also one that comes by the straight way
        now = PlannedCall.of(layer, x) if held.kind is PlannedCall and isinstance(call, StraightCall) else call
        inputs = () if now is None else now.inputs()
        if not same_inputs(held.inputs, inputs) or held.facts != held.kind.facts(inputs):
            return None
        return self._handed_out(layer, held)

    def take_at_a_look(self, layer: nn.Module, x: Tensor, is_same: Callable[[Any, Any], bool]) -> Tensor | None:
        """Do as `take` where the call was read at one look, and the layer is as it was; None says
        no more than that the call is to be read.
        """
        held = self._outputs.get(layer)
        if held is None or self._x() is not x or held.kind is not StraightCall:
            return None
        if self._around != surroundings(x) or not unwatched(x):
            return None
        if not is_same(layer, held.inputs) or held.facts != StraightCall.facts(held.inputs):
            return None
        return self._handed_out(layer, held)

    def _handed_out(self, layer: nn.Module, held: _Output) -> Tensor:
        del self._outputs[layer]
        if not self._outputs:
            self.drop()
        return held.y

    def drop(self) -> None:
        """Let go of all."""
        if self.group is not None:
            _let_go(self.group, self._outputs)
        self.group, self._x, self._outputs = None, None, {}


_held = _Held()


def _let_go(group: Group, outputs: dict[Any, _Output]) -> None:
    if outputs:
        group.miss(outputs)
        outputs.clear()


def _together(group: Group, x: Tensor, calls: Mapping[Any, Any]) -> Tensor:
    """Compute the outputs of a group; keep all but the leader's for their layers."""
    _held.drop()
    leader, *rest = calls
    y, *others = calls[leader].together(list(calls.values()))
    outputs = {}
    for layer, other in zip(rest, others, strict=True):
        call = calls[layer]
        inputs = call.inputs()
        outputs[layer] = _Output(type(call), inputs, call.facts(inputs), other)
    _held.put(group, x, outputs)
    group.ran(leader, y)
    return y


def form(layers: Sequence[nn.Module]) -> None:
    """Make a group of layers that each have a place."""
    group = Group(layers)
    for layer in layers:
        layer.__dict__[PLACE].group = group


def handed_out(layer: nn.Module, x: Tensor, is_same: Callable[[Any, Any], bool]) -> Tensor | None:
    """Return what the first of its group computed for `layer`, if it is called with that x and
    nothing has changed since; None says no more than that its call is to be read.

    Args:
        layer: The layer.
        x: Its input.
        is_same: Tells of a layer, and of what a call of it that was read at one look was made of,
            whether it would be read so again.
    """
    group = _held.group
    if group is None or is_compiling():
        return None
    place = place_of(layer)
    return None if place is None or place.group is not group else _held.take_at_a_look(layer, x, is_same)


def run(layer: nn.Module, x: Tensor, call: Call) -> Tensor:
    """Run a call that was read at one look, with those of its siblings where they share x."""
    place = place_of(layer)
    return run_straight(call) if place is None else place.run(layer, x, StraightCall(call))


def run_planned(layer: nn.Module, x: Tensor, run: Any) -> Tensor:
    """Run what plan.py found, with the calls of the layer's siblings where they share x.

    Args:
        layer: The layer.
        x: Its input.
        run: x → y; a `PlannedRun` may be one of a group.
    """
    place = None if is_compiling() else place_of(layer)
    if place is not None and isinstance(run, PlannedRun):
        return place.run(layer, x, PlannedCall(run, x))
    y: Tensor = run(x)
    if place is not None:
        place.ran_alone(layer, y)
    return y


def ran_alone(layer: nn.Module, y: Tensor) -> None:
    """Take note of a call that PEFT's own forward computed."""
    place = None if is_compiling() else place_of(layer)
    if place is not None:
        place.ran_alone(layer, y)


def place_of(layer: nn.Module) -> Place | None:
    """Return a layer's place, or None: it has no siblings, or shares nothing."""
    place: Place | None = layer.__dict__.get(PLACE)
    return place
