"""What real calls launch, without a GPU: every kernel with its arguments, and the library's GEMMs.

    with recording() as seen:
        y = functional.lora_linear(...)         # CPU tensors of the real sizes, nothing computed
    seen.steps      [Launch(kernel, ...), Gemm(T, K, N, ...), ...] in the order of the calls

Triton binds the arguments as it does on a device (alignment of pointers, strides of 1, multiples of
16) and asks for the binary of that variant; a `Launch` says which one. Nothing is compiled:
`compiling.py` does it, each variant once. The GEMMs of torch give memory that nobody wrote.
"""

import hashlib
import importlib
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import triton.compiler
from torch import Tensor
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

from benchmarks.stand_in import Launcher, StandIn, standing_in
from delora_kernels.backends.triton import launch


class Uncompiled(CompiledKernel):
    """What stands for a compiled kernel: the signature, constants and alignment facts that Triton
    wanted compiled.
    """

    run: Any = Launcher()

    def __init__(self, src: Any, target: Any = None, options: Any = None, **_: Any) -> None:
        self.src, self.name, self.module, self._run = src, src.fn.__name__, 1, self.run
        self.metadata, self.options = SimpleNamespace(target=target), options
        self.function, self.packed_metadata = object(), (options["num_warps"], options["num_stages"])


class Binary(NamedTuple):
    """What Triton compiles a variant from: two launches of equal ones run the same code."""

    module: str
    kernel: str
    signature: dict[str, str]
    constants: dict[tuple[int, ...], Any]
    attributes: dict[tuple[int, ...], Any]
    options: dict[str, Any]

    @property
    def key(self) -> str:
        """Twelve hexadecimal digits that tell it from others."""
        return hashlib.sha256(repr(self).encode()).hexdigest()[:12]

    def source(self) -> ASTSource:
        """Return what `triton.compile` takes."""
        function = getattr(importlib.import_module(self.module), self.kernel)
        return ASTSource(function, self.signature, self.constants, self.attributes)

    @property
    def says(self) -> str:
        """Its constants, in a line."""
        names = list(self.signature)
        kept = {names[at[0]]: value for at, value in self.constants.items() if value is not None}
        kept |= {"warps": self.options["num_warps"], "stages": self.options["num_stages"]}
        return json.dumps({name: value for name, value in kept.items() if value is not False}, default=str)


class Operand(NamedTuple):
    """A tensor that a launch gets: its parameter, bytes, dtype."""

    name: str
    bytes: int
    dtype: str


class Launch(NamedTuple):
    """One launch: which binary, how many programs, the tensors and the integers it gets."""

    binary: Binary
    grid: tuple[int, ...]
    operands: tuple[Operand, ...]
    integers: dict[str, int]

    @property
    def programs(self) -> int:
        """Of the whole grid."""
        return self.grid[0] * self.grid[1] * self.grid[2]


class Gemm(NamedTuple):
    """A product of torch's: [M, K] · [K, N], added to what is there or not."""

    M: int
    K: int
    N: int
    adds: bool


class Other(NamedTuple):
    """Any other operation of torch's that would be a launch: a cast, a fill, a concatenation."""

    name: str
    bytes: int


class Seen:
    """The steps of what ran, in order."""

    def __init__(self) -> None:
        self.steps: list[Launch | Gemm | Other] = []

    @property
    def launches(self) -> list[Launch]:
        """Of Triton's kernels."""
        return [step for step in self.steps if isinstance(step, Launch)]


@contextmanager
def recording(capability: tuple[int, int] = (9, 0)) -> Iterator[Seen]:
    """See what runs inside on CPU tensors, on the Triton backend in front of a stand-in."""
    seen, run, held = Seen(), JITFunction.run, dict[Any, Any]()
    real = triton.compiler.compile
    forget = getattr(launch, "forget", lambda: None)  # commits that remember no plans have none

    def record(kernel: Any, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if kernel not in held:
            held[kernel] = kernel.device_caches
            kernel.device_caches = defaultdict(kernel.create_binder)  # which sets kernel.compile
        variant = run(kernel, *args, grid=grid, warmup=warmup, **options)
        source, wanted = variant.src, variant.options
        binary = Binary(
            kernel.fn.__module__, kernel.fn.__name__, source.signature, source.constants, source.attrs,
            dict(wanted),
        )  # fmt: skip
        named = dict(zip(kernel.arg_names, args, strict=False))
        operands = [_operand(name, value) for name, value in named.items() if not isinstance(value, (int, float))]
        integers = {name: value for name, value in named.items() if type(value) is int}
        size = grid if isinstance(grid, tuple) else grid(named | options)
        found = tuple(operand for operand in operands if operand is not None)
        seen.steps.append(Launch(binary, (*size, 1, 1)[:3], found, integers))
        return None  # so that nobody keeps it and launches it directly

    JITFunction.run, triton.compiler.compile = record, Uncompiled
    forget()
    try:
        with standing_in(StandIn(capability)), _untouched(seen):
            yield seen
    finally:
        JITFunction.run, triton.compiler.compile = run, real
        for kernel, caches in held.items():
            kernel.device_caches, kernel.compile = caches, real
        forget()


def _operand(name: str, value: Any) -> Operand | None:
    tensor = getattr(value, "base", value)  # of a descriptor
    if not isinstance(tensor, Tensor) or not tensor.numel():
        return None
    return Operand(name, tensor.numel() * tensor.itemsize, str(tensor.dtype).removeprefix("torch."))


@contextmanager
def _untouched(seen: Seen) -> Iterator[None]:
    """CPU kernels of torch that would take long, or say something of what a GPU would launch, only
    note that they were called.
    """

    def mm(left: Tensor, right: Tensor) -> Tensor:
        seen.steps.append(Gemm(left.shape[0], left.shape[1], right.shape[1], False))
        return left.new_empty((left.shape[0], right.shape[1]))

    def mm_out(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
        seen.steps.append(Gemm(left.shape[0], left.shape[1], right.shape[1], False))
        return out

    def addmm(base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        # a library takes a row that is added everywhere (a bias) in its epilogue
        whole = base.dim() == 2 and base.shape[0] == left.shape[0]
        seen.steps.append(Gemm(left.shape[0], left.shape[1], right.shape[1], whole))
        return left.new_empty((left.shape[0], right.shape[1]))

    def addmm_out(
        base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1, out: Tensor
    ) -> Tensor:
        seen.steps.append(Gemm(left.shape[0], left.shape[1], right.shape[1], True))
        return out

    def addmm_in_place(base: Tensor, left: Tensor, right: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
        return addmm_out(base, left, right, out=base)

    def copy(into: Tensor, source: Tensor | float, non_blocking: bool = False) -> Tensor:
        read = source.numel() * source.itemsize if isinstance(source, Tensor) else 0
        seen.steps.append(Other("copy", into.numel() * into.itemsize + read))
        return into

    def zero(tensor: Tensor) -> Tensor:
        seen.steps.append(Other("zero", tensor.numel() * tensor.itemsize))
        return tensor

    def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
        shape = list(tensors[0].shape)
        shape[dim] = sum(tensor.shape[dim] for tensor in tensors)
        out = tensors[0].new_empty(shape)
        seen.steps.append(Other("cat", 2 * out.numel() * out.itemsize))
        return out

    stubs = {"mm": mm, "mm.out": mm_out, "addmm": addmm, "addmm.out": addmm_out, "addmm_": addmm_in_place}
    stubs |= {"copy_": copy, "zero_": zero, "cat": cat}
    library = torch.library.Library("aten", "IMPL")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that kernels are overridden
            for name, stub in stubs.items():
                library.impl(name, stub, "CPU", allow_override=True)
        yield
    finally:
        library._destroy()
