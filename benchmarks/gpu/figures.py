"""Each launch of a layer by itself: measured, estimated, and what its bytes alone would take.

The launches are those of real calls: while a layer runs, each is timed where it is made, caches
cold, again and again (a launch only writes its outputs anew). Before them: the library's GEMMs, our
GEMM over them, and what adding to an output (beta = 1) costs. What raises is a row, and the next
goes on. Estimates need no device: they are made before or after (`estimated`), and come to the rows
that are on the disk (`add_estimates`).
"""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from benchmarks import kernel_figures
from benchmarks.cases import PRECISIONS, Case
from benchmarks.codegen import device as constants
from benchmarks.codegen.calls import SHAPES, Layer
from benchmarks.codegen.recording import Binary, recording
from benchmarks.gpu.rows import Rows
from benchmarks.layer import methods
from benchmarks.timing import Budget, Clock, interleaved
from delora_kernels import functional, use_backend
from delora_kernels.backends import tape
from delora_kernels.backends.triton import launch as launching

TIMED = Budget(seconds=0, least=7, most=7)


def layers() -> Iterator[Layer]:
    """Yield the layers whose launches are timed, the most telling first."""
    for K, N in SHAPES:
        for method, r in (("lora", 16), ("dora", 16), ("lora", 64), ("dora", 64)):
            yield Layer(method, K, N, r)
        yield Layer("goat", K, N, 2, E=8, k=2)
        yield Layer("ether-plus-both", K, N, 0)


def launches(layer: Layer, device: str, clock: Clock, budget: Budget = TIMED) -> list[dict[str, Any]]:
    """Return kernel, grid, µs and bytes of each launch of a forward and backward pass, in order."""
    found: list[dict[str, Any]] = []

    def timed(record: Any, grid: Any, tensors: tuple[Any, ...], *others: Any) -> None:
        def again() -> None:
            launching.launch(record, grid, tensors, *others)

        ms = interleaved({"launch": again}, clock, budget)["launch"].median_ms
        given = [getattr(tensor, "base", tensor) for tensor in tensors if tensor is not None]
        moved = sum(tensor.numel() * tensor.itemsize for tensor in given)
        name = record.kernel.fn.__name__.removesuffix("_kernel")
        found.append({"kernel": name, "grid": list(grid), "us": 1e3 * ms, "bytes": moved})

    with _launching(timed):
        run_once(layer, device)
    return found


@contextmanager
def _launching(function: Callable[..., None]) -> Iterator[None]:
    """Every module of the backend launches through `function`; nothing is replayed."""
    prefix, enabled = "delora_kernels.backends.triton.", tape.enabled
    holders = [module for name, module in list(sys.modules.items()) if name.startswith(prefix)]
    users = [m for m in holders if m is not launching and getattr(m, "launch", None) is launching.launch]
    patches = [patch.object(module, "launch", function) for module in users]
    tape.enabled = False
    for each in patches:
        each.start()
    try:
        yield
    finally:
        tape.enabled = enabled
        for each in patches:
            each.stop()


def run_once(layer: Layer, device: str) -> None:
    """One forward and backward pass on random inputs."""
    sizes = layer.T, layer.K, layer.N, layer.r
    made = methods.inputs(Case(layer.method, "", *sizes, layer.precision, E=layer.E, k=layer.k), device, seed=0)
    dy, spec = made.pop("grad_out"), methods.METHODS[layer.method]
    for name in ("x", *spec.trained):
        made[name].requires_grad_()
    dtype, _, autocast, _ = PRECISIONS[layer.precision]
    with use_backend("triton"), torch.autocast(torch.device(device).type, dtype, enabled=autocast):
        y = getattr(functional, spec.function)(**made)
    with use_backend("triton"):
        (y if isinstance(y, Tensor) else y[0]).backward(dy)


def gemm_binaries(capability: tuple[int, int] = (9, 0)) -> list[Binary]:
    """Return what our own GEMM launches where it is timed beside the library's."""
    found: dict[str, Binary] = {}
    blank = patch.object(kernel_figures, "_normal", lambda device, *shape: torch.empty(shape, dtype=torch.bfloat16))
    with blank, recording(capability) as seen:
        for K, N in SHAPES:
            for name, run in kernel_figures.gemms(kernel_figures.TOKENS, K, N, "cpu").items():
                if name.startswith("own"):
                    run()
    for launch in seen.launches:
        found[launch.binary.key] = launch.binary
    return list(found.values())


def measure(table: Rows, device: str, clock: Clock, until: float) -> bool:
    """Add the rows of the GEMMs, then of every layer's launches, until the time is over; whether
    all were begun.

    Args:
        table: Where they go.
        device: Where it runs.
        clock: Of the device.
        until: On time.monotonic.
    """
    left = []
    for K, N in SHAPES:
        if time.monotonic() > until:
            left.append(f"GEMMs {K} → {N}")
            continue
        with _noted(table, "GEMMs", K, N):
            times = interleaved(kernel_figures.gemms(kernel_figures.TOKENS, K, N, device), clock, TIMED, _nothing)
            for ours, other in kernel_figures.RATIOS:
                if ours in times and other in times:
                    us = 1e3 * times[ours].median_ms, 1e3 * times[other].median_ms
                    table.add({"figure": f"{ours} / {other}", "K": K, "N": N, "us": us[0], "ratio": us[0] / us[1]})
    for layer in layers():
        if time.monotonic() > until:
            left.append(f"{layer.title} {layer.K} → {layer.N}")
            continue
        with _noted(table, layer.title, layer.K, layer.N):
            for number, row in enumerate(launches(layer, device, clock)):
                floor = 1e6 * row["bytes"] / constants.COPY
                facts = {"layer": layer.title, "K": layer.K, "N": layer.N, "number": number, **row}
                table.add(facts | {"bytes_us": floor, "lost_us": row["us"] - floor})
    if left:
        print(f"not begun in time: {'; '.join(left)}", flush=True)
        table.note(left=left)
    return not left


def _nothing(name: str, error: Exception) -> None:
    print(f"{name} raised {type(error).__name__}: {' '.join(str(error).split())[:300]}", flush=True)


@contextmanager
def _noted(table: Rows, what: str, K: int, N: int) -> Iterator[None]:
    """Make a row of what raises inside."""
    try:
        yield
    except Exception as error:
        text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        table.add({"failed": what, "K": K, "N": N, "says": text})


def estimated(wanted: list[Layer], workers: int | None = None) -> list[dict[str, Any]]:
    """Return the estimate of each layer: a row of `benchmarks.model --from-binaries`."""
    from benchmarks.codegen import estimates

    return [estimates.row_of(*found) for found in estimates.estimates_of(wanted, workers)]


def add_estimates(rows: list[dict[str, Any]], estimates: list[dict[str, Any]]) -> None:
    """Put the estimate of each launch beside what was measured, where both have the same kernel."""
    known = {(row["layer"], row["K"], row["N"]): row["kernels"] for row in estimates}
    for row in rows:
        guesses = known.get((row.get("layer"), row["K"], row["N"]), []) if "number" in row else []
        if len(guesses) > row.get("number", 0) and guesses[row["number"]]["kernel"] == row["kernel"]:
            row |= {"estimate_us": guesses[row["number"]]["us"], "limit": guesses[row["number"]]["limit"]}


def by_loss(rows: list[dict[str, Any]], most: int = 40) -> list[str]:
    """Return the launches as a table, what loses most first."""
    found = sorted((row for row in rows if "lost_us" in row), key=lambda row: -row["lost_us"])
    shown = ["| kernel | layer | K | N | µs | estimated | its bytes | lost |", "| --- | --- |" + " ---: |" * 6]
    for row in found[:most]:
        guess = f"{row['estimate_us']:.0f}" if row.get("estimate_us") is not None else ""
        times = f"{row['us']:.1f} | {guess} | {row['bytes_us']:.1f} | {row['lost_us']:.1f}"
        shown.append(f"| {row['kernel']} | {row['layer']} | {row['K']} | {row['N']} | {times} |")
    return shown
