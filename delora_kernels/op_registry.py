"""How an op is registered, and how a call reaches the kernels of a backend.

`op` makes of an op's arguments, results and fake (ops.py writes them down) the function
`ops.<name>(..., backend)` and the registered torch.ops.delora_kernels.<name>, in whose schema the
fields of tuples (`op_arguments.py`) stand in a row; `stages` gives the kernels straight where
nothing stands in between. The last argument names the backend that runs an op, so that a backward
pass runs on the backend of its forward pass, also after `use_backend` has been left and in a
compiled graph.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import partial, wraps
from itertools import islice
from typing import Any, NamedTuple, get_args

import torch
from torch import Tensor

from delora_kernels import backends

NAMESPACE = "delora_kernels"
_library = torch.library.Library(NAMESPACE, "DEF")

Outputs = Tensor | tuple[Tensor, ...]

_IN_SCHEMA: dict[Any, str] = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    bool: "bool",
    int: "int",
    float: "float",
    Sequence[int]: "int[]",
    Sequence[float]: "float[]",
    torch.dtype: "ScalarType",
    str: "str",
}

PLAIN = (Tensor, torch.nn.Parameter, type(None))
"""What kernels may be given straight: a tensor subclass must see the calls."""


class _Op(NamedTuple):
    """A registered op, and for each argument of its function the tuple that it is, or None."""

    registered: Any
    tuples: tuple[Any, ...]


OPS: dict[str, _Op] = {}
"""Name → op, in the order of ops.py."""


def stages(backend: str, tensors: Iterable[Tensor | None]) -> Any:
    """Return the ops of one backend, each without its last argument: its kernels themselves, or
    where a compiler, tracer, dispatch mode or tensor subclass must see the calls, the registered
    ops. These also get tensors whose numbers are not the ones in memory (torch's negative bit, as
    the imaginary part of a conjugate has it) as torch's dispatcher makes them: real negatives.

    Autograd does not see the kernels: this is for the inside of an autograd Function, with autocast
    off.
    """
    if (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._get_tracing_state() is not None
    ):
        return _registered[backend]
    for tensor in tensors:
        if type(tensor) not in PLAIN or (tensor is not None and tensor.is_neg()):
            return _registered[backend]
    return backends.loaded[backend]  # the call's choice has loaded it


def registered(backend: str) -> Any:
    """Return the registered ops of one backend, each without its last argument: whoever takes part
    in dispatch sees them.
    """
    return _registered[backend]


def _wants_scaled(backend: str, x: Tensor, weight: Tensor) -> bool:
    return bool(backends.load(backend).wants_scaled(x, weight))


class _Registered:
    """The registered ops with the name of a backend as their last argument."""

    def __init__(self, backend: str) -> None:
        self.backend = backend
        self.wants_scaled = partial(_wants_scaled, backend)

    @property
    def keeps_folded(self) -> bool:
        """As the backend's own."""
        return bool(getattr(backends.load(self.backend), "keeps_folded", False))


_registered = {backend: _Registered(backend) for backend in backends.NAMES}
"""Backend → its registered ops; `op` adds each of them."""


def _call(name: str, backend: str, *arguments: Any) -> Any:
    return OPS[name].registered(*flat(name, arguments), backend)


def flat(name: str, arguments: Iterable[Any]) -> list[Any]:
    """Make of the arguments of an op's function the values of its schema, but for the backend."""
    values: list[Any] = []
    for kind, argument in zip(OPS[name].tuples, arguments, strict=True):
        if kind is None:
            values.append(argument)
        else:
            values.extend(argument)
    return values


def packed(name: str, values: Iterable[Any]) -> list[Any]:
    """Make of the values of an op's schema, but for the backend, the arguments of its function:
    `flat` back.
    """
    left = iter(values)
    return [next(left) if kind is None else kind(*islice(left, len(kind._fields))) for kind in OPS[name].tuples]


def op(fake: Callable[..., Outputs]) -> Any:
    """Register what is written below as an op, and return its function, which takes the backend's
    name besides.
    """
    name, kinds = fake.__name__, dict(fake.__annotations__)
    results, fields, tuples = kinds.pop("return"), [], []
    for argument, kind in kinds.items():
        is_tuple = hasattr(kind, "_fields")
        tuples.append(kind if is_tuple else None)
        fields += list(kind.__annotations__.items()) if is_tuple else [(argument, kind)]
    taken = ", ".join(f"{_IN_SCHEMA[kind]} {field}" for field, kind in (*fields, ("backend", str)))
    given = ", ".join(_IN_SCHEMA[kind] for kind in get_args(results)) or "Tensor"
    _library.define(f"{name}({taken}) -> {f'({given})' if ',' in given else given}")
    registered = getattr(getattr(torch.ops, NAMESPACE), name).default
    OPS[name] = _Op(registered, tuple(tuples))

    def run(*values: Any) -> Outputs:
        kernel = getattr(backends.load(values[-1]), name)
        arguments = packed(name, values[:-1])
        device = next(value.device.type for value in values if isinstance(value, Tensor))
        if torch.is_autocast_enabled(device):  # the stages choose every dtype themselves
            with torch.autocast(device, enabled=False):
                return kernel(*arguments)
        return kernel(*arguments)

    def refuse_autograd(*values: Any) -> Outputs:
        if torch.is_grad_enabled() and any(isinstance(value, Tensor) and value.requires_grad for value in values):
            raise RuntimeError(
                f"{NAMESPACE}::{name} has no autograd formula of its own: call the functions of "
                "delora_kernels.functional, or delora_kernels.reference for second derivatives"
            )
        with torch._C._AutoDispatchBelowAutograd():
            return registered(*values)

    @wraps(fake)
    def call(*arguments: Any) -> Any:
        return _call(name, arguments[-1], *arguments[:-1])

    for backend, registered_ops in _registered.items():
        setattr(registered_ops, name, partial(_call, name, backend))
    _library.impl(name, run, "CompositeExplicitAutograd")
    _library.impl(name, refuse_autograd, "Autograd")
    # the fake: as register_fake, which takes five times as long to note where it was called
    _library.impl(name, lambda *values: fake(*packed(name, values[:-1])), "Meta")
    return call
