"""What every launch shares: the way to the device, the layout of operands, how a dot takes
two of them.

`launch` takes Triton's own path once for each variant of a kernel, and remembers what that
compiled. Later calls give it to the driver's launcher directly: Triton binds and judges every
argument anew, which costs several times as much. A kernel's parameters are tensors, integers (those
it is not specialised for first), floats, constants, in this order.
"""

import inspect
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.compiler import CompiledKernel
from triton.runtime import driver

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
"""Variants that are remembered: beyond, all are forgotten, and found again by Triton's path."""


class Ready(NamedTuple):
    """A compiled variant: the driver's launcher, its function on the device, its metadata, its
    constants' values.
    """

    kernel: CompiledKernel
    run: Any
    function: Any
    metadata: Any
    constants: tuple[Any, ...]


_ready: dict[tuple[Any, ...], Ready] = {}


def launch(
    kernel: Any,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    integers: tuple[int, ...],
    floats: tuple[float, ...] = (),
    /,
    **constants: Any,
) -> None:
    """Run `kernel` over `grid`, on the device of its tensors and the current stream there.

    Args:
        kernel: Its parameters are `tensors`, `integers`, `floats`, `constants`, in this order.
        grid: One to three numbers of programs.
        tensors: Tensors, tensor descriptors, and None for those that this variant does without.
        integers: First those that the kernel is not specialised for (`do_not_specialize`).
        floats: Triton specialises nothing for them.
        constants: Of the kernel, and Triton's options (num_warps, ...).
    """
    if INTERPRETED:
        kernel[grid](*tensors, *integers, *floats, **constants)
        return
    # All that the compiled code depends on. Of an integer that is its width, whether it is 1,
    # whether it is a multiple of 16: its value says as much, and is had for nothing. Of those that
    # change from call to call it is the width.
    pointers: list[Any] = []
    facts: list[Any] = [id(kernel)]
    for tensor in tensors:
        if tensor is None:
            pointers.append(None)
            facts.append(None)
        elif type(tensor) is TensorDescriptor:
            pointers.append(tensor)
            facts.append((tensor.base.dtype, *tensor.block_shape))
        else:
            pointer, device = tensor.data_ptr(), tensor.get_device()
            pointers.append(pointer)
            facts.append((tensor.dtype,) if pointer & 15 else tensor.dtype)
    free = len(kernel.do_not_specialize)
    for integer in integers[:free]:
        facts.append(integer >> 31)
    key = (device, *facts, *integers[free:], *constants, *constants.values())
    active = driver.active
    if device != active.get_current_device():
        with torch.cuda.device(device):
            launch(kernel, grid, tensors, integers, floats, **constants)
        return
    ready = _ready.get(key)
    if ready is None or kernel.pre_run_hooks or _watched():
        compiled = kernel[grid](*tensors, *integers, *floats, **constants)
        if ready is None:
            _remember(key, kernel, compiled, (*tensors, *integers, *floats), len(tensors), constants)
        return
    x, y, z = (*grid, 1, 1)[:3]
    stream = active.get_current_stream(device)
    ready.run(
        x, y, z, stream, ready.function, ready.metadata, None, None, None,
        *pointers, *integers, *floats, *ready.constants,
    )  # fmt: skip


def _watched() -> bool:
    """Whether a profiler's hooks want to see each launch, or kernels are to be compiled otherwise
    than by default.
    """
    runtime = knobs.runtime
    for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
        if getattr(hook, "calls", hook):  # a function or None; from Triton 3.5 a chain of functions
            return True
    return bool(
        runtime.debug
        or getattr(knobs.compilation, "instrumentation_mode", None)
        or getattr(runtime, "add_stages_inspection_hook", None)
    )


def _remember(
    key: tuple[Any, ...], kernel: Any, compiled: Any, given: tuple[Any, ...], tensors: int, constants: dict[str, Any]
) -> None:
    """Keep what Triton's path launched, where it is of a kind that `launch` knows to call."""
    held = kernel.do_not_specialize
    if set(held) != set(kernel.arg_names[tensors : tensors + len(held)]):
        raise TypeError(f"{kernel}: the integers that it is not specialised for must follow its tensors")
    if knobs is None or _watched() or not isinstance(compiled, CompiledKernel):
        return
    run = compiled.run
    launcher = list(inspect.signature(type(run).__call__).parameters)
    if compiled.metadata.target.backend != "cuda" or launcher not in LAUNCHERS:
        return
    if len(_ready) >= MOST:
        _ready.clear()
    values = tuple(constants[name] for name in kernel.arg_names[len(given) :])
    _ready[key] = Ready(compiled, run, compiled.function, compiled.packed_metadata, values)


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


def precision(dtype: torch.dtype, how: int) -> str:
    """`input_precision` of a dot: three tf32 products stand in for float32 where the operands were
    mixed.
    """
    if how == WIDE:
        return "tf32x3"
    return "tf32" if dtype == torch.float32 and allow_tf32() else "ieee"
