"""A stand-in for a GPU: Triton compiles for one, and every launch ends where the driver would be
called.

    with standing_in(): ...         the Triton backend takes CPU tensors; its kernels are compiled
                                    for sm_90 and never run
    with cuda_standing_in(): ...    the CUDA backend takes CPU tensors; in place of its library is a
                                    C function that does nothing

What calls compute is left undefined: this is for what happens on the host.
"""

import ctypes
import ctypes.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from delora_kernels import backends
from delora_kernels.backends.cuda import launch as cuda_launch
from delora_kernels.backends.cuda import library
from delora_kernels.backends.cuda import support as cuda_support
from delora_kernels.backends.triton import forms, support


class Launcher:
    """Stands where the driver's launcher does; hands what it gets to `StandIn.seen`."""

    def __init__(self, *_: Any) -> None:
        pass

    def __call__(self, gridX: int, gridY: int, gridZ: int, stream: int, function: Any, *args: Any) -> None:
        """One launch."""
        seen = driver.active.seen
        if seen is not None:
            seen((gridX, gridY, gridZ), stream, function, args)


class StandIn:
    """The driver of one device, that of CPU tensors.

    Args:
        capability: The compute capability that kernels are compiled for.
        seen: Called with grid, stream, function and arguments of every launch; or None.
    """

    launcher_cls = Launcher

    def __init__(self, capability: tuple[int, int] = (9, 0), seen: Callable[..., None] | None = None) -> None:
        self.capability, self.seen = capability, seen
        self.device, self.stream = -1, 0
        self.utils = self

    def get_current_device(self) -> int:
        """Return what torch says of a CPU tensor, unless it was set to another."""
        return self.device

    def get_current_stream(self, device: int) -> int:
        """Any number."""
        return self.stream

    def get_current_target(self) -> GPUTarget:
        """Return what kernels are compiled for."""
        return GPUTarget("cuda", self.capability[0] * 10 + self.capability[1], 32)

    def get_device_properties(self, device: int) -> dict[str, int]:
        """Return what Triton asks for: an H100's shared memory."""
        return {"max_shared_mem": 227 * 1024}

    def load_binary(self, *_: Any) -> tuple[int, int, int, int, int]:
        """Return module, function, registers, spills and the most threads of a program."""
        return 1, 1, 32, 0, 1024


@contextmanager
def standing_in(stand_in: StandIn | None = None) -> Iterator[StandIn]:
    """Return the Triton backend available, on CPU tensors, in front of a stand-in."""
    stand_in, cpu = stand_in or StandIn(), torch.device("cpu")
    before = driver.__dict__.get("_active", driver.__dict__.get("active"))
    unavailable, interpreted = dict(backends._unavailable), support.INTERPRETED
    driver.set_active(stand_in)
    backends._unavailable["triton"] = None
    support.INTERPRETED = True  # that is what lets CPU tensors in
    forms._capabilities[cpu] = stand_in.capability
    try:
        yield stand_in
    finally:
        driver.set_active(before)
        backends._unavailable.clear()
        backends._unavailable.update(unavailable)
        support.INTERPRETED = interpreted
        forms._capabilities.pop(cpu)


class StandInLibrary:
    """Has the functions of the CUDA library: launchers take any arguments and return 0.

    `fegetround` stands for all of them: it looks at no argument, and rounding to nearest is 0.
    """

    def __init__(self) -> None:
        mathematics = ctypes.CDLL(ctypes.util.find_library("m"))
        for name in cuda_launch.FUNCTIONS:
            setattr(self, name, mathematics["fegetround"])
        self.dk_error_string = self.dk_on_host = mathematics["fegetround"]
        self.dk_route_tokens, self.dk_dy_sums_columns = lambda: 32, lambda: 128  # of a block: any numbers


@contextmanager
def cuda_standing_in() -> Iterator[None]:
    """Make the CUDA backend available, on CPU tensors, in front of a library that does nothing."""
    load = library.load
    before: Any = [(held, dict(held)) for held in (backends._unavailable, cuda_support._against)]
    stand_in: Any = StandInLibrary()
    library.load = lambda functions: stand_in  # type: ignore[assignment]
    cuda_launch.library.cache_clear()
    backends._unavailable["cuda"] = None
    cuda_support._against["cpu", None] = None
    backends.load("cuda")
    try:
        yield
    finally:
        library.load = load
        cuda_launch.library.cache_clear()
        for held, values in before:
            held.clear()
            held.update(values)
