"""What a launch costs the host: by Triton's own path, and directly, once it is compiled
(backends/triton/launch.py).

    python -m benchmarks.launch_overhead [--json FILE]

On a CUDA device the kernels run; elsewhere they are compiled for sm_90 and a stand-in takes the
driver's place, so that its own time is left out of both columns. Of a whole call the library's
GEMMs, tiny here, are in both columns too.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from benchmarks.stand_in import standing_in
from benchmarks.timing import Budget, interleaved
from delora_kernels import use_backend
from delora_kernels.backends import tape
from delora_kernels.backends.triton import launch
from delora_kernels.testing import METHODS

T, N, R = 16, 64, 4
CALLS = {"lora": 128, "dora": 64, "delora": 64, "moe": 64, "goat": 128, "ether-plus": 64}
CALLS |= {"lora-dropout": 64, "dora-dropout": 64, "grouped-lora": 64}
"""Methods whose whole calls are timed → K: at 128 its sum is split. With fewer, some kernel would
not be launched.
"""
REPEATS = 20
"""Launches between two looks at the clock."""

Launch = tuple[Any, ...]
Row = dict[str, Any]


class HostClock:
    """perf_counter around REPEATS of each pass; what they left on the device ends outside."""

    def __init__(self, device: str) -> None:
        self.wait: Callable[[], Any] = torch.cuda.synchronize if device == "cuda" else lambda: None

    def round(self, passes: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float | None] | Exception]:
        """Milliseconds of one repetition."""
        spent: dict[str, tuple[float, float | None] | Exception] = {}
        for name, run in passes.items():
            start = time.perf_counter()
            for _ in range(REPEATS):
                run()
            spent[name] = 1e3 * (time.perf_counter() - start) / REPEATS, None
            self.wait()
        return spent


def by_triton(
    record: launch.Record,
    grid: tuple[int, ...],
    tensors: tuple[Any, ...],
    free: tuple[int, ...] = (),
    floats: tuple[float, ...] = (),
) -> None:
    """Make a launch by Triton's own path."""
    record.kernel[grid](*tensors, *free, *record.integers, *floats, **record.constants)


WAYS: dict[str, Callable[..., None]] = {"triton": by_triton, "direct": launch.launch}


def _launchers() -> list[ModuleType]:
    """Return the modules of the backend that launch kernels."""
    package = launch.__name__.rpartition(".")[0]
    found = [module for name, module in sys.modules.items() if name.startswith(f"{package}.") and module is not launch]
    return [module for module in found if getattr(module, "launch", None) is launch.launch]


@contextmanager
def launching(function: Callable[..., None], modules: list[ModuleType]) -> Iterator[None]:
    """Every launch of these modules goes by `function`; nothing is replayed."""
    enabled, tape.enabled = tape.enabled, False
    for module in modules:
        vars(module)["launch"] = function
    try:
        yield
    finally:
        tape.enabled = enabled
        for module in modules:
            vars(module)["launch"] = launch.launch


def _calls(device: str) -> dict[str, dict[str, Callable[[], Any]]]:
    """Return method → forward, and forward with backward."""
    found: dict[str, dict[str, Callable[[], Any]]] = {}
    for name, K in CALLS.items():
        inputs = METHODS[name].draw(T, K, N, R, dtype=torch.bfloat16, adapter_dtype=torch.float32, device=device)
        plain = {key: value.detach() if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        found[name] = {"forward": partial(METHODS[name].forward, plain), "both": partial(METHODS[name].fused, plain)}
    return found


def _recorded(run: Callable[[], Any], modules: list[ModuleType]) -> list[Launch]:
    launches: list[Launch] = []

    def record(*args: Any) -> None:
        launches.append(args)
        launch.launch(*args)

    with launching(record, modules):
        run()
    return launches


def _by(way: Callable[..., None], run: Callable[[], Any], modules: list[ModuleType]) -> None:
    with launching(way, modules):
        run()


def _compared(ways: Mapping[str, Callable[[], Any]], device: str, budget: Budget) -> Row:
    times = interleaved(ways, HostClock(device), budget)
    return {f"{way}_us": 1e3 * found.median_ms for way, found in times.items()}


def measured(device: str, budget: Budget) -> list[Row]:
    """Return a row for each kernel, {"kernel", "arguments", "triton_us", "direct_us"}, then for
    each call, with "launches".
    """
    rows: list[Row] = []
    calls, modules = _calls(device), _launchers()
    kernels: dict[str, Launch] = {}
    for passes in calls.values():
        for found in _recorded(passes["both"], modules):
            kernels.setdefault(found[0].kernel.__name__, found)
    for kernel, args in sorted(kernels.items()):
        count = sum(len(group) for group in args[2:]) + len(args[0].integers) + len(args[0].constants)
        ways = {name: partial(way, *args) for name, way in WAYS.items()}
        rows.append({"kernel": kernel, "arguments": count} | _compared(ways, device, budget))
    for method, passes in calls.items():
        for what, run in passes.items():
            count = len(_recorded(run, modules))
            ways = {name: partial(_by, way, run, modules) for name, way in WAYS.items()}
            label = f"{method}, forward" + (" and backward" if what == "both" else "")
            rows.append({"call": label, "launches": count} | _compared(ways, device, budget))
    return rows


def table(rows: list[Row]) -> str:
    """Two Markdown tables, microseconds and their ratio."""
    lines = []
    for what, counted in (("kernel", "arguments"), ("call", "launches")):
        lines += [
            f"| {what} | {counted} | Triton's path, µs | direct, µs | of it |",
            "| --- | ---: | ---: | ---: | ---: |",
        ]
        for row in (row for row in rows if what in row):
            triton, direct = row["triton_us"], row["direct_us"]
            lines.append(f"| {row[what]} | {row[counted]} | {triton:.1f} | {direct:.1f} | {direct / triton:.2f} |")
        lines.append("")
    return "\n".join(lines)


def main(argv: list[str] | None = None, budget: Budget | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    if launch.INTERPRETED:
        print("benchmarks.launch_overhead: the interpreter launches nothing", file=sys.stderr)
        return 2
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with ExitStack() as stack:
        if device == "cpu":
            stack.enter_context(standing_in())
        stack.enter_context(use_backend("triton"))
        rows = measured(device, budget or Budget(seconds=1.0, least=15, most=200))
    print("On this GPU" if device == "cuda" else "Without a GPU, in front of a stand-in for the driver")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
