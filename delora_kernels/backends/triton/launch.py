"""What every launch shares: the way to the device, the layout of operands, how a dot takes
two of them.

A `Record` is a kernel with the integers and constants of one kind of launch. `launch` takes
Triton's own path once for each variant of it (its device, the dtypes and alignment of its pointers)
and keeps in the record what that compiled. Later calls give it to the driver's launcher directly,
with nothing but pointers and sizes: Triton binds and judges every argument anew, which costs
several times as much. What a launcher chooses besides (tiles, grids, splits) it chooses once for
each kind of call, in a function that is `planned`. Neither holds a pointer, or anything that
depends on what is in a tensor. A kernel's parameters are tensors, integers (those it is not
specialised for first), floats, constants, in this order.
"""

import inspect
import os
from collections.abc import Callable
from functools import lru_cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

from delora_kernels.backends import tape
from delora_kernels.dtypes import allow_tf32

try:
    from triton import knobs
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton 3.3
    knobs = TensorDescriptor = None

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
"""Whether kernels run in Triton's interpreter, on CPU tensors: Triton decides it when a kernel is
defined.
"""

PLAIN, SPLIT_SMALL, SPLIT_BOTH, WIDE = 0, 1, 2, 3
"""How a dot takes two operands: as they are; the small one as three bfloat16 parts; both as two;
both in float32.
"""

_START = ["self", "gridX", "gridY", "gridZ", "stream", "function"]
LAUNCHERS = (
    [*_START, "args"],
    [*_START, "kernel_metadata", "launch_metadata", "launch_enter_hook", "launch_exit_hook", "args"],
)
"""Parameters of the launchers that `launch` can call: of Triton 3.4 to 3.6, and of 3.7 to 3.9."""

MOST = 4096
"""Plans of one launcher, and records, that are remembered; beyond, they are forgotten."""
MOST_VARIANTS = 64
"""Of a record: beyond, all are forgotten, and found again by Triton's path."""


class Ready(NamedTuple):
    """A compiled variant: the driver's launcher, its function on the device, its metadata."""

    kernel: CompiledKernel
    run: Any
    function: Any
    metadata: Any


class Record:
    """A kernel with the integers and constants of one kind of launch, and its compiled variants.

    Args:
        kernel: Its parameters are tensors, integers, floats, constants, in this order.
        integers: Those that the kernel is specialised for.
        constants: Name → value, of the kernel, and Triton's options (num_warps, ...).
    """

    __slots__ = ("constants", "integers", "kernel", "values", "variants")

    def __init__(self, kernel: Any, integers: tuple[int, ...], constants: dict[str, Any]) -> None:
        self.kernel, self.integers, self.constants = kernel, integers, constants
        self.values = tuple(constants[name] for name in kernel.arg_names if name in constants)
        self.variants: dict[tuple[Any, ...], Ready] = {}


_plans: list[Any] = []
_records: dict[tuple[Any, ...], Record] = {}


def planned(function: Callable[..., Any]) -> Any:
    """Remember what a function makes of sizes, strides, dtypes and devices, all of them arguments.

    The tables that it reads are constants: whoever changes them calls `forget`. In the interpreter,
    whose tests do, nothing is remembered.
    """
    if INTERPRETED:
        return function
    kept = lru_cache(MOST)(function)
    _plans.append(kept)
    return kept


def forget() -> None:
    """Forget every plan and record, because the tables that they come from have changed."""
    tape.forget()
    _records.clear()
    for plan in _plans:
        plan.cache_clear()


def record(kernel: Any, integers: tuple[int, ...] = (), **constants: Any) -> Record:
    """Return the record of a kind of launch, the same one for the same arguments."""
    key = (kernel.fn, integers, *constants, *constants.values())
    found = _records.get(key)
    if found is None:
        if len(_records) >= MOST:
            _records.clear()
        found = _records[key] = Record(kernel, integers, constants)
    return found


def launch(
    record: Record,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    free: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> None:
    """Run a kernel over `grid`, on the device of its tensors and the current stream there.

    Args:
        record: The kernel, its integers and constants.
        grid: One to three numbers of programs.
        tensors: Tensors, tensor descriptors, and None for those that this variant does without.
        free: The integers that the kernel is not specialised for (`do_not_specialize`).
        floats: Triton specialises nothing for them.
    """
    if tape.recording and tape.launched(launch, bound, record, grid, tensors, free, floats):
        return
    kernel = record.kernel
    if INTERPRETED:
        kernel[grid](*tensors, *free, *record.integers, *floats, **record.constants)
        return
    # All that the compiled code depends on and the record does not say. Of an integer that changes
    # from call to call it is the width.
    pointers: list[Any] = []
    facts: list[Any] = [integer >> 31 for integer in free] if free else []
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
            facts.append(None)
        elif type(tensor) is TensorDescriptor:
            pointers.append(tensor)
            facts.append((tensor.base.dtype, *tensor.block_shape))
        else:
            pointer, last = tensor.data_ptr(), tensor
            pointers.append(pointer)
            facts.append((tensor.dtype,) if pointer & 15 else tensor.dtype)
    device = last.get_device()
    active = driver.active
    if device != active.get_current_device():
        with torch.cuda.device(device):
            launch(record, grid, tensors, free, floats)
        return
    key = (device, *facts)
    ready = record.variants.get(key)
    if ready is None or kernel.pre_run_hooks or _watched():
        compiled = kernel[grid](*tensors, *free, *record.integers, *floats, **record.constants)
        if ready is None:
            _remember(record, key, compiled, len(tensors), len(free))
        return
    x, y, z = grid if len(grid) == 3 else (*grid, 1, 1)[:3]
    ready.run(
        x, y, z, active.get_current_stream(device), ready.function, ready.metadata, None, None, None,
        *pointers, *free, *record.integers, *floats, *record.values,
    )  # fmt: skip


def begin(device: int) -> int | None:
    """Return the current stream of a device, if launches there are as usual; None where another
    device is current, or somebody wants to see each launch.
    """
    if INTERPRETED or knobs is None:
        return None
    active = driver.active
    if device != active.get_current_device() or _watched():
        return None
    stream: int = active.get_current_stream(device)
    return stream


def bound(
    record: Record, grid: tuple[int, ...], tensors: tuple[Any, ...], free: tuple[int, ...], floats: tuple[float, ...]
) -> tuple[Callable[..., None], tuple[Any, ...]] | None:
    """Return this launch as a function of what `begin` returned and of tensors of the same dtypes,
    on the same device; and its tensors. None: it is of tensor descriptors, which are made anew.

    The function is written out, as one call of the driver's launcher. A variant that is not known
    yet goes by `launch`.
    """
    if any(type(tensor) is TensorDescriptor for tensor in tensors):
        return None
    device = next(tensor for tensor in reversed(tensors) if tensor is not None).get_device()
    key = (device, *(integer >> 31 for integer in free), *(t if t is None else t.dtype for t in tensors))
    names = [None if tensor is None else f"t{place}" for place, tensor in enumerate(tensors)]
    given = [name for name in names if name is not None]
    pointers = [name if name is None else f"p{name}" for name in names]
    tail = (*free, *record.integers, *floats, *record.values)
    source = f"""
def launch_again(stream, {", ".join(given)}):
    global ready, run, function, metadata
    {"; ".join(f"p{name} = {name}.data_ptr()" for name in given)}
    if ready is None:
        ready = variants.get(key)
        if ready is not None:
            _, run, function, metadata = ready
    if ready is None or ({" | ".join(f"p{name}" for name in given)}) & 15 or kernel.pre_run_hooks:
        return launch(record, grid, ({", ".join(map(str, names))},), free, floats)
    run(
        {", ".join(map(str, (*grid, 1, 1)[:3]))}, stream, function, metadata, None, None, None,
        {", ".join(map(str, pointers))}, {", ".join(f"c{i}" for i in range(len(tail)))}
    )
"""
    made: dict[str, Any] = {f"c{i}": value for i, value in enumerate(tail)}
    made |= {"variants": record.variants, "key": key, "kernel": record.kernel, "launch": launch, "ready": None}
    made |= {"record": record, "grid": grid, "free": free, "floats": floats}
    exec(source, made)
    return made["launch_again"], tuple(tensor for tensor in tensors if tensor is not None)


def _watched() -> bool:
    """Whether a profiler's hooks want to see each launch, or kernels are to be compiled otherwise
    than by default.
    """
    runtime = knobs.runtime
    before, after = runtime.launch_enter_hook, runtime.launch_exit_hook
    return bool(  # a hook is a function or None; from Triton 3.5 a chain of functions
        getattr(before, "calls", before)
        or getattr(after, "calls", after)
        or runtime.debug
        or getattr(knobs.compilation, "instrumentation_mode", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def _remember(record: Record, key: tuple[Any, ...], compiled: Any, tensors: int, free: int) -> None:
    """Keep what Triton's path launched, where it is of a kind that `launch` knows to call."""
    kernel = record.kernel
    if set(kernel.do_not_specialize) != set(kernel.arg_names[tensors : tensors + free]):
        raise TypeError(f"{kernel}: the integers that it is not specialised for must follow its tensors")
    if knobs is None or _watched() or not isinstance(compiled, CompiledKernel):
        return
    run = compiled.run
    launcher = list(inspect.signature(type(run).__call__).parameters)
    if compiled.metadata.target.backend != "cuda" or launcher not in LAUNCHERS:
        return
    if len(record.variants) >= MOST_VARIANTS:
        record.variants.clear()
    record.variants[key] = Ready(compiled, run, compiled.function, compiled.packed_metadata)


def rows(matrix: Tensor) -> Tensor:
    """Return the matrix itself if its last dimension is contiguous, else one copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


def dot_split(big: torch.dtype, small: torch.dtype) -> int:
    """How a token-sized operand and a small one are multiplied, so that nothing is lost that eager
    PyTorch keeps.
    """
    if big == small:
        return PLAIN
    return SPLIT_SMALL if (big, small) == (torch.bfloat16, torch.float32) else WIDE


def dot_split_in_rank(h: torch.dtype, small: torch.dtype, out: torch.dtype) -> int:
    """How two rank-space operands are multiplied for a result in `out`: float32 ones stay as exact,
    on fast units.
    """
    if h == small == torch.float32 != out:
        return SPLIT_BOTH if out == torch.bfloat16 else WIDE
    return dot_split(h, small)


def precision(how: int, tf32: bool) -> str:
    """`input_precision` of a dot: three tf32 products stand in for float32 where the operands were
    mixed.

    Args:
        how: As `dot_split` says.
        tf32: What `in_tf32` says of the operands.
    """
    if how == WIDE:
        return "tf32x3"
    return "tf32" if tf32 else "ieee"


def in_tf32(dtype: torch.dtype) -> bool:
    """Whether operands of `dtype` are float32 and may be multiplied as tf32."""
    return dtype == torch.float32 and allow_tf32()
