"""A stand-in for the driver that sees every launch, and `Uncompiled` in the place of compiled
kernels: nothing is compiled or run.

For tests that have Triton and are not in its interpreter.
"""

import importlib
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import triton.compiler
from torch import Tensor
from triton.runtime.jit import JITFunction

from benchmarks import launch_overhead
from benchmarks.codegen.recording import Uncompiled as Variant
from benchmarks.stand_in import StandIn, standing_in
from delora_kernels.backends import tape
from delora_kernels.backends import triton as backend
from delora_kernels.backends.triton import launch

MODULES = [importlib.import_module(f"{backend.__name__}.{m.name}") for m in pkgutil.iter_modules(backend.__path__)]
KERNELS = {
    name: value
    for module in MODULES
    for name, value in vars(module).items()
    if isinstance(value, JITFunction) and name.endswith("_kernel")
}


@contextmanager
def seeing(monkeypatch: pytest.MonkeyPatch) -> Iterator["Seen"]:
    """A stand-in for the driver, kernels that nothing has compiled yet, nothing remembered."""
    launch.forget()
    monkeypatch.setattr(triton.compiler, "compile", Variant)
    for kernel in KERNELS.values():
        monkeypatch.setattr(kernel, "compile", Variant, raising=False)
        monkeypatch.setattr(kernel, "device_caches", defaultdict(kernel.create_binder))
    seen = Seen()
    with standing_in(StandIn(seen=seen)) as seen.stand_in:
        yield seen
    launch.forget()


def ready() -> list[launch.Ready]:
    """Every variant that is remembered."""
    return [variant for record in launch._records.values() for variant in record.variants.values()]


class Seen:
    """Every launch as the driver got it; `direct` counts those that did not come by Triton's
    path.
    """

    def __init__(self) -> None:
        self.launches: list[Any] = []
        self.direct = 0
        self.stand_in = StandIn()

    def __call__(self, grid: Any, stream: int, function: Any, args: tuple[Any, ...]) -> None:
        metadata, _launch_metadata, _enter_hook, _exit_hook, *rest = args
        self.launches.append((grid, stream, function, metadata, rest))
        above = sys._getframe(2)  # what called the launcher, or one that calls it
        callers = [above.f_code, above.f_back.f_code if above.f_back else None]
        replayed = any(code is not None and code.co_name == "launch_again" for code in callers)
        self.direct += replayed or REAL.__code__ in callers

    def pair(self, record: launch.Record, *call: Any) -> None:
        """One launch by `launch` and once more by Triton's path: the driver must get the same."""
        kernel = record.kernel
        self.launches.clear()
        REAL(record, *call)
        launch_overhead.by_triton(record, *call)
        ours, theirs = self.launches
        assert ours[:4] == theirs[:4], kernel
        for got, expected in zip(ours[4], theirs[4], strict=True):
            expected = expected.data_ptr() if isinstance(expected, Tensor) and type(got) is int else expected
            assert got is expected or (type(got) is type(expected) and got == expected), kernel


REAL = launch.launch


def checked(monkeypatch: pytest.MonkeyPatch, seen: Seen) -> list[Any]:
    """Every launch of the backend goes through `pair`; the list of kernels that were launched."""
    launched: list[Any] = []
    for module in MODULES:
        if module is not launch and hasattr(module, "launch"):
            monkeypatch.setattr(module, "launch", lambda *a: (launched.append(a[0].kernel), seen.pair(*a)))
    monkeypatch.setattr(tape, "enabled", False)
    return launched


def misaligned(tensor: Tensor) -> Tensor:
    """The same numbers, not at a multiple of 16 bytes."""
    flat = tensor.new_empty(tensor.numel() + 1)
    flat[1:] = tensor.flatten()
    assert flat[1:].data_ptr() % 16 != 0
    return flat[1:].view(tensor.shape)
