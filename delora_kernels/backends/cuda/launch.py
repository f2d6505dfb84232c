"""The binding of csrc/delora_kernels.h: one call launches one kernel; a status that is not 0
becomes an error.

Tensors go as pointers, strides and a dtype; nothing is copied, converted or waited for. The library
is loaded at the first call (`library.py`). One that csrc/host_shim compiled runs the same kernels
on CPU tensors, for tests.
"""

import ctypes
from collections.abc import Callable, Iterable
from ctypes import c_char_p, c_float, c_int32, c_int64, c_void_p
from functools import cache
from typing import Any

import torch
from torch import Tensor

from delora_kernels.backends import tape
from delora_kernels.backends.cuda import library as cuda_library
from delora_kernels.dtypes import allow_tf32

DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
"""dk_dtype of the header."""


class Matrix(ctypes.Structure):
    """dk_matrix of the header."""

    _fields_ = (("data", c_void_p), ("row_stride", c_int64), ("column_stride", c_int64), ("dtype", c_int32))


class Vector(ctypes.Structure):
    """dk_vector of the header."""

    _fields_ = (("data", c_void_p), ("stride", c_int64), ("dtype", c_int32))


_M, _V, _P, _L, _I, _F = Matrix, Vector, c_void_p, c_int64, c_int32, c_float
_GATING = (_M, _P, _P, _P, _M, _P, _P, _L, _L, _L, _L, _L, _I, _I)
"""What `route` and `project_route` have in common, from h on."""

LAUNCHERS: dict[str, tuple[Any, ...]] = {
    "fold": (_M, _M, _V, _V, _M, _M, _P, _P, _L, _L, _L, _F, _F),
    "fold_backward": (_M, _M, _M, _M, _V, _V, _M, _P, _P, _M, _M, _P, _L, _L, _L, _L, _F),
    "row_norm": (_M, _M, _M, _V, _P, _P, _M, _L, _L, _L, _F),
    "times_small": (_M, _M, _M, _L, _L, _L, _L, _P, _I, _F),
    "token_sums": (_M, _M, _M, _M, _M, _P, _P, _P, _L, _L, _L, _L, _L, _I, _P, _I, _F),
    "add_parts": (_P, _L, _L, _P, _I),
    "dy_sums": (_M, _M, _P, _M, _M, _P, _P, _P, _P, _L, _L, _L, _L, _F),
    "finish_dy": (_P, _L, _L, _P, _I, _P, _P, _P, _L, _M, _P, _V, _P, _P, _P, _L, _L),
    "rank_update": (_M, _M, _M, _P, _M, _V, _M, _L, _L, _L, _F, _P, _I, _I),
    "grouped_times_small": (_M, _M, _L, _P, _I, _M, _L, _L, _L, _L, _P, _I, _F),
    "grouped_update": (_M, _M, _M, _L, _M, _P, _I, _L, _L, _L, _L, _F, _P, _I),
    "grouped_sums": (_M, _M, _P, _I, _P, _P, _P, _L, _L, _L, _L, _L, _P, _I, _F),
    "grouped_total": (_P, _I, _P, _P, _P, _L, _L, _L, _L, _L),
    "scaled": (_M, _P, _M, _L, _L, _I),
    "dropout_mask": (_P, _I, _P, _L, _L),
    "drop": (_M, _P, _I, _F, _M, _M, _L, _L),
    "route": (_P, _L, *_GATING),
    "project_route": (_M, _M, _L, *_GATING, _P, _I, _F),
    "route_totals": (_P, _L, _L, _F, _P, _P, _P),
    "route_backward": (
        *(_P, _L, _I, _M, _P, _P, _P, _P, _P, _M, _P, _P),
        *(_L, _L, _L, _L, _I, _I, _I),
        *(_P, _P, _L, _P, _P, _L),
    ),
    "stack_factors": (_M, _M, _M, _M, _M, _P, _M, _M, _L, _L, _L, _L, _L, _L, _L, _L, _L),
    "reflect": (_M, _M, _M, _V, _M, _L, _L, _L),
    "reflect_backward": (_M, _M, _M, _M, _M, _P, _L, _L, _L, _L),
    "reflect_across": (_P, _M, _M, _P, _P, _L, _L),
}
"""Launcher dk_<name> → the types of its arguments, but for `in_tf32` and the stream, which `launch`
adds.
"""

PRODUCTS = (
    *("row_norm", "times_small", "project_route", "token_sums", "dy_sums", "rank_update"),
    *("grouped_times_small", "grouped_update", "grouped_sums"),
)
"""Those whose last argument but one is `in_tf32`: whether float32 operands may be multiplied as
tf32.
"""

FUNCTIONS = (*(f"dk_{name}" for name in LAUNCHERS), "dk_route_tokens", "dk_dy_sums_columns")
"""What the library must have."""


@cache
def library() -> ctypes.CDLL:
    """Return the library with the types of its functions declared."""
    loaded = cuda_library.load(FUNCTIONS)
    for name, types in LAUNCHERS.items():
        getattr(loaded, f"dk_{name}").argtypes = (*types, *([c_int32] if name in PRODUCTS else []), c_void_p)
    loaded.dk_error_string.restype = c_char_p
    loaded.dk_route_tokens.argtypes, loaded.dk_route_tokens.restype = (), c_int64
    loaded.dk_dy_sums_columns.argtypes, loaded.dk_dy_sums_columns.restype = (), c_int64
    return loaded


@cache
def on_host() -> bool:
    """Whether the library runs kernels on CPU tensors (csrc/host_shim)."""
    return bool(library().dk_on_host())


def launch(name: str, *arguments: Tensor | float | bool | None) -> None:
    """Launch dk_<name> on the current stream of its tensors' device.

    Args:
        name: A key of `LAUNCHERS`.
        *arguments: As in the header, without `in_tf32` and the stream. A tensor stands for a
            matrix, a vector (0-d: one number for all) or a pointer, which must be contiguous; None
            for what is not there.

    Raises:
        RuntimeError: the launcher refused its arguments, or CUDA the launch.
    """
    if tape.recording and tape.launched(launch, bound, name, *arguments):
        return
    function, types = getattr(library(), f"dk_{name}"), LAUNCHERS[name]
    values = [_CONVERT.get(kind, _as_it_is)(value) for kind, value in zip(types, arguments, strict=True)]
    first = next(value for value in arguments if isinstance(value, Tensor))
    if name in PRODUCTS:
        values.append(_in_tf32(first))
    device = first.device
    if device.type == "cuda":
        with torch.cuda.device(device):
            status = function(*values, torch.cuda.current_stream(device).cuda_stream)
    else:
        status = function(*values, None)
    if status:
        _failed(name, arguments, status)


def _in_tf32(first: Tensor) -> bool:
    return first.dtype == torch.float32 and allow_tf32()


def _failed(name: str, arguments: Iterable[Any], status: int) -> None:
    words = library().dk_error_string(status).decode()
    described = ", ".join(_describe(value) for value in arguments)
    raise RuntimeError(f"delora_kernels: the CUDA kernel {name}({described}) failed: {words} (status {status})")


def begin(device: int) -> int | None:
    """Return the current stream of a device; None where another one is current, or kernels run on
    the host.
    """
    if on_host() or (device >= 0 and device != torch.cuda.current_device()):
        return None
    return torch.cuda.current_stream(device).cuda_stream if device >= 0 else 0


def bound(name: str, *arguments: Tensor | float | bool | None) -> tuple[Callable[..., None], tuple[Tensor, ...]]:
    """Return this launch as a function of what `begin` returned and of tensors of the same dtypes
    and strides, on the same device; and its tensors.

    The function is written out, as one call of the launcher.
    """
    tensors = tuple(value for value in arguments if isinstance(value, Tensor))
    made: dict[str, Any] = {"library": library, "failed": _failed, "Matrix": Matrix, "Vector": Vector}
    given: list[str] = []
    for place, (kind, value) in enumerate(zip(LAUNCHERS[name], arguments, strict=True)):
        usual = _CONVERT.get(kind, _as_it_is)(value)
        if isinstance(value, Tensor):
            given.append(_written(usual, f"t{sum(isinstance(each, Tensor) for each in arguments[:place])}"))
        else:
            made[f"c{place}"] = usual
            given.append(f"c{place}")
    given += [str(_in_tf32(tensors[0]))] if name in PRODUCTS else []
    names = [f"t{place}" for place in range(len(tensors))]
    source = f"""
def launch_again(stream, {", ".join(names)}):
    status = library().dk_{name}({", ".join(given)}, stream)
    if status:
        failed({name!r}, ({", ".join(names)},), status)
"""
    exec(source, made)
    return made["launch_again"], tensors


def _written(value: Any, tensor: str) -> str:
    """Return how straight code writes an argument like `value`, of the pointer of `tensor`."""
    if isinstance(value, Matrix):
        return f"Matrix({tensor}.data_ptr(), {value.row_stride}, {value.column_stride}, {value.dtype})"
    if isinstance(value, Vector):
        return f"Vector({tensor}.data_ptr(), {value.stride}, {value.dtype})"
    return f"{tensor}.data_ptr()"


def _as_it_is(value: Any) -> Any:
    return value


def _matrix(tensor: Tensor | None) -> Matrix:
    if tensor is None:
        return Matrix()
    row, column = tensor.stride()
    if column != 1 and tensor.shape[1] <= 1:
        column = 1  # a stride that nobody takes
    return Matrix(tensor.data_ptr(), row, column, DTYPES.get(tensor.dtype, -1))


def _vector(tensor: Tensor | None) -> Vector:
    if tensor is None:
        return Vector()
    return Vector(tensor.data_ptr(), tensor.stride(0) if tensor.dim() else 0, DTYPES.get(tensor.dtype, -1))


def _pointer(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    if not tensor.is_contiguous():
        raise ValueError(f"a kernel takes contiguous memory here, got {_describe(tensor)}")
    return tensor.data_ptr()


_CONVERT: dict[Any, Callable[[Any], Any]] = {Matrix: _matrix, Vector: _vector, c_void_p: _pointer}


def _describe(value: Tensor | float | bool | None) -> str:
    if not isinstance(value, Tensor):
        return str(value)
    return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)} strides {list(value.stride())}"


def rows(matrix: Tensor) -> Tensor:
    """Return the matrix itself if its last dimension is contiguous, else one copy."""
    return matrix if matrix.stride(-1) == 1 or matrix.shape[-1] <= 1 else matrix.contiguous()


SPLIT_TARGET = 528
"""Blocks that a reduction is split into: four for each of an H200's 132 multiprocessors."""

TILE = 64
"""Tokens, columns and ranks of the tiles of `times_small` and `token_sums`."""


def tiles(size: int) -> int:
    """How many tiles cover `size`."""
    return -(-size // TILE)


def splits(blocks: int, steps: int) -> int:
    """Into how many parts a reduction of `steps` steps is split when `blocks` blocks run anyway."""
    return max(1, min(steps, SPLIT_TARGET // max(1, blocks)))
