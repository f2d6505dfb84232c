"""What a call does with its tensors, recorded once and replayed: the calls of torch and the
launches, without the code that chose them.

A call of kernels decides a lot (forms, tiles, splits, what is kept) that depends on nothing but
shapes, strides, dtypes, devices and options. Where these come for the third time, the call runs
under a `Recorder`, which sees every torch function that makes a tensor and every launch; from then
on their sequence runs as straight code, on the tensors of the day. It holds no tensor, no pointer
and nothing that depends on what is in one. A call that asks for a tensor's content, or uses a
tensor that is neither its own nor an argument, is never replayed.
"""

import os
import threading
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import _C, Tensor
from torch.overrides import TorchFunctionMode

ENVIRONMENT_VARIABLE = "DELORA_KERNELS_PLANS"
enabled = os.environ.get(ENVIRONMENT_VARIABLE) != "0"
"""Whether anything is replayed."""

MOST = 4096
"""Kinds of passes, and of calls, that are known: those of 200 lengths and ten shapes of layers.
Beyond, the oldest are forgotten.
"""
RECORDED_AT = 3
"""The time that a kind of call comes at which it is recorded: a batch of a length that never comes
again is not.
"""

_known: dict[Any, Any] = {}
calls: dict[Any, Any] = {}
"""Whole calls that are known to be replayed: what decides one → its plan (autograd/replayed.py)."""

_recorder = threading.local()
recording = 0
"""How many recorders are at work, on any thread: where there is none, a launch asks no further."""

_counting = threading.Lock()

_STREAM = object()
"""Stands in a launch's arguments for the stream of the day."""

_METADATA = {"__get__", "__len__", "stride", "size", "dim", "numel", "get_device", "is_contiguous", "element_size"}
_METADATA |= {"is_floating_point", "storage_offset", "ndimension", "nelement", "is_complex", "__hash__"}
"""Torch functions whose result is no tensor, and depends on no content."""
_IN_PLACE = {"__iadd__", "__isub__", "__imul__", "__itruediv__", "__iand__", "__ior__", "__ixor__", "__ipow__"}
_EMPTY = {"new_empty", "empty", "empty_like", "empty_strided"}
"""Torch functions that return memory."""
_MEMORY = {kind: getattr(_C._dynamo.guards, f"_empty_strided_{kind}", None) for kind in ("cpu", "cuda")}
"""Type of a device → (shape, strides, dtype) → memory on the current one, in half the time of
`empty_strided`: what compiled graphs call.
"""
_VIEWS = {"t", "squeeze", "unsqueeze", "view", "flatten", "__getitem__"}
_NO_EFFECT = _VIEWS | {"empty_strided", "_empty_strided_cpu", "_empty_strided_cuda"}
_NO_EFFECT |= {"new_zeros", "zeros", "zeros_like", "full", "new_full"}
_NO_EFFECT |= {"reshape", "expand", "detach", "unbind", "contiguous", "to", "__get__"}
"""Torch functions that are left out where nobody uses what they make."""


Begin = Callable[[int], int | None]
"""(device index) → the stream that launches there go to now; None: they are not as usual."""


def forget() -> None:
    """Forget every kind of call, because what it was decided from has changed."""
    _known.clear()
    calls.clear()


def facts(tensors: Iterable[Tensor | None]) -> tuple[Any, ...]:
    """Return all of these tensors that a call may depend on: what they are, never what is in them;
    of where they begin in their storage, what alignment hangs on.
    """
    return tuple(
        [None if t is None else (t.dtype, t.device, t.shape, t.stride(), t.storage_offset() & 7) for t in tensors]
    )


def looks(tensors: Iterable[Any]) -> tuple[Any, ...]:
    """Return `facts` of tensors whose class has not been looked at, and that class."""
    return tuple(
        [
            None if t is None else (t.__class__, t.dtype, t.device, t.shape, t.stride(), t.storage_offset() & 7)
            for t in tensors
        ]
    )


def replay_of(key: tuple[Any, ...], inputs: tuple[Tensor | None, ...]) -> tuple[int, Callable[..., Any]] | None:
    """Return the index of the device and the straight code of a function that `run` would replay;
    None where it would not, or not yet.
    """
    found = _known.get((key, facts(inputs)), 0)
    return found if type(found) is tuple else None


def keep(key: Any, call: Any) -> None:
    """Keep the plan of a whole call."""
    _make_room(calls)
    calls[key] = call


def _make_room(known: dict[Any, Any]) -> None:
    """Forget the oldest eighth where there is no room for one more."""
    if len(known) >= MOST:
        for key in list(known)[: max(1, MOST // 8)]:
            known.pop(key, None)


def run(begin: Begin, key: tuple[Any, ...], inputs: tuple[Tensor | None, ...], function: Callable[[], Any]) -> Any:
    """Return what the function does: by running it, or by replaying what it did.

    Args:
        begin: The backend's; where it returns None nothing is replayed or recorded.
        key: All that decides what the function does, hashable; `facts` of the inputs count besides.
        inputs: Every tensor that it works on.
        function: Returns tensors, and tuples and dicts of them.
    """
    key = (key, facts(inputs))
    known = _known.get(key, 0)
    if type(known) is tuple:
        stream = begin(known[0])
        return function() if stream is None else known[1](stream, *inputs)
    if known < 0 or getattr(_recorder, "active", None) is not None:
        return function()
    if known + 1 < RECORDED_AT:
        if known == 0:
            _make_room(_known)
        _known[key] = known + 1
        return function()
    device = next(tensor for tensor in inputs if tensor is not None).get_device()
    if begin(device) is None:
        return function()
    with Recorder(inputs) as recorder:
        result = function()
    straight = recorder.straight(result)
    _known[key] = -1 if straight is None else (device, straight)
    return result


def launched(launch: Callable[..., None], bound: Callable[..., Any], *arguments: Any) -> bool:
    """Make a launch and note it, where a recorder is at work on this thread; tell whether one is.

    Args:
        launch: Makes it.
        bound: Returns it as a function of a stream and its tensors, and the tuple of these; or
            None: it can't be made again.
        arguments: Of both.
    """
    recorder = getattr(_recorder, "active", None)
    if recorder is None or not recorder.noting:
        return False
    recorder.noting = False
    try:
        launch(*arguments)
        found = bound(*arguments)
    finally:
        recorder.noting = True
    if found is None:
        recorder.unknown = "a launch that can't be made again"
    else:
        recorder.note(found[0], (_STREAM, *map(recorder.base_of, found[1])), {}, None)
    return True


class Recorder(TorchFunctionMode):
    """Sees what a function does with its inputs.

    Args:
        inputs: Every tensor that it works on, or None for those that it does without.
    """

    def __init__(self, inputs: tuple[Tensor | None, ...]) -> None:
        super().__init__()
        self.arguments = [f"t{place}" for place in range(len(inputs))]
        self.names: dict[int, str] = {}
        self.alive: list[Any] = list(inputs)  # so that no two tensors have one id
        self.constants: dict[str, Any] = {}
        self.bases: dict[int, Tensor] = {}
        self.steps: list[tuple[str, str, list[str]]] = []  # function, its arguments, what it makes
        self.unknown: str | None = None
        for name, tensor in zip(self.arguments, inputs, strict=True):
            if tensor is not None:
                if id(tensor) in self.names and tensor.numel():
                    self.unknown = "a tensor that is two of the inputs"
                self.names[id(tensor)] = name
        self.noting = True

    def __enter__(self) -> "Recorder":
        global recording
        with _counting:
            recording += 1
        _recorder.active = self
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        global recording
        super().__exit__(*error)
        _recorder.active = None
        with _counting:
            recording -= 1

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run the function, and note it."""
        result = function(*args, **(kwargs or {}))
        if self.noting:
            self.note(function, args, kwargs or {}, result)
        return result

    def note(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        """Keep one step."""
        name = getattr(function, "__name__", "")
        self.noting = False  # what looks at tensors below is no step
        try:
            made = [result] if isinstance(result, Tensor) else list(result) if isinstance(result, tuple | list) else []
            made = [each for each in made if isinstance(each, Tensor)]
            if not made and result is not None:
                if name not in _METADATA:
                    self.unknown = name
                return
            out = kwargs.get("out") is not None
            own = out or result is None or (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE
            if not own and len(made) == 1 and any(made[0] is each for each in args):
                return  # such as .to(dtype) of a tensor that is of that dtype
            if name in _EMPTY and len(made) == 1:
                function, args = torch.empty_strided, (tuple(result.shape), result.stride())
                kwargs, made_fast = {"dtype": result.dtype, "device": result.device}, _MEMORY.get(result.device.type)
                if made_fast is not None:
                    function, args, kwargs = made_fast, (*args, result.dtype), {}
            given = [self._written(each) for each in args]
            given += [f"{key}={self._written(value)}" for key, value in kwargs.items()]
            self.alive.append((args, kwargs, result))
            if name in _VIEWS and len(made) == 1 and made[0].data_ptr() == args[0].data_ptr():
                self.bases[id(made[0])] = self.base_of(args[0])
            fresh = []
            for tensor in made:
                if id(tensor) not in self.names:
                    self.names[id(tensor)] = f"m{len(self.names)}"
                fresh.append(self.names[id(tensor)])
            target = fresh if isinstance(result, tuple | list) else fresh[:1]
            self.steps.append((self._constant(function), ", ".join(given), [] if own else target))
            if own and made and fresh[0] not in given and not out:
                self.unknown = name
        finally:
            self.noting = True

    def base_of(self, tensor: Any) -> Any:
        """Return the tensor that a view starts with: for a launch, which has its strides already,
        the same.
        """
        return self.bases.get(id(tensor), tensor)

    def _constant(self, value: Any) -> str:
        name = f"c{len(self.constants)}"
        self.constants[name] = value
        return name

    def _written(self, value: Any) -> str:
        """Return how straight code writes an argument or a result."""
        if value is _STREAM:
            return "stream"
        if isinstance(value, Tensor):
            if id(value) in self.names:
                return self.names[id(value)]
            if value.numel():
                self.unknown = "a tensor of unknown origin"
            return self._constant(value)
        if isinstance(value, tuple | list) and any(_holds(each) for each in value):
            inside = ", ".join(map(self._written, value))
            if hasattr(value, "_fields"):
                return f"{self._constant(type(value))}({inside})"
            return f"({inside},)" if isinstance(value, tuple) else f"[{inside}]"
        if isinstance(value, dict) and any(map(_holds, value.values())):
            return "{" + ", ".join(f"{self._constant(key)}: {self._written(each)}" for key, each in value.items()) + "}"
        return "None" if value is None else self._constant(value)

    def straight(self, result: Any) -> Callable[..., Any] | None:
        """Return the function that does the steps and returns what `result` is then; None where one
        can't be replayed.
        """
        self.noting = False
        returned = self._written(result)
        self.alive.clear()
        if self.unknown is not None:
            return None
        used = set(_names(returned))
        lines = [f"    return {returned}"]
        for function, given, target in reversed(self.steps):
            if target and getattr(self.constants[function], "__name__", "") in _NO_EFFECT and not used & set(target):
                continue
            last = [name for name in dict.fromkeys((*_names(given), *target)) if name not in used]
            dropped = [name for name in last if name.startswith("m")]
            if dropped:
                lines.append(f"    del {', '.join(dropped)}")
            makes = f"{', '.join(target)}{',' if len(target) > 1 else ''} = " if target else ""
            lines.append(f"    {makes}{function}({given})")
            used |= {*_names(given), *target}
        source = "\n".join([f"def replay({', '.join(('stream', *self.arguments))}):", *reversed(lines)])
        made: dict[str, Any] = {}
        exec(compile(source, f"<{__name__}>", "exec"), self.constants, made)
        replay: Callable[..., Any] = made["replay"]
        return replay


def _holds(value: Any) -> bool:
    """Whether there is a tensor in it."""
    if isinstance(value, tuple | list):
        return any(map(_holds, value))
    return isinstance(value, Tensor) or (isinstance(value, dict) and any(map(_holds, value.values())))


def _names(written: str) -> list[str]:
    """Return the tensors in a piece of straight code."""
    words = "".join(letter if letter.isalnum() or letter == "_" else " " for letter in written).split()
    return [word for word in words if word[0] in "tm" and word[1:].isdigit()]
