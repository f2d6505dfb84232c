"""Each launch of a layer by itself: measured, estimated, and what its bytes alone would take.

The launches are those of real calls: while a layer runs, each is timed where it is made, caches
cold, again and again (a launch only writes its outputs anew). Before them: the library's GEMMs, our
GEMM over them, and what adding to an output (beta = 1) costs.
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


def measure(
    table: Rows, device: str, clock: Clock, until: float, estimated: dict[tuple[str, int, int], list[dict[str, Any]]]
) -> bool:
    """Add the rows of the GEMMs, then of every layer's launches, until the time is over; whether
    all were done.

    Args:
        table: Where they go.
        device: Where it runs.
        clock: Of the device.
        until: On time.monotonic.
        estimated: (title, K, N) → an estimate of each launch, in order, where there is one.
    """
    for K, N in SHAPES:
        times = interleaved(kernel_figures.gemms(kernel_figures.TOKENS, K, N, device), clock, TIMED)
        for ours, other in kernel_figures.RATIOS:
            us = 1e3 * times[ours].median_ms, 1e3 * times[other].median_ms
            table.add({"figure": f"{ours} / {other}", "K": K, "N": N, "us": us[0], "ratio": us[0] / us[1]})
    for layer in layers():
        if time.monotonic() > until:
            return False
        guesses = estimated.get((layer.title, layer.K, layer.N), [])
        found = launches(layer, device, clock)
        for at, row in enumerate(found):
            guess = guesses[at] if len(guesses) == len(found) and guesses[at]["kernel"] == row["kernel"] else {}
            floor = 1e6 * row["bytes"] / constants.COPY
            facts = {"layer": layer.title, "K": layer.K, "N": layer.N, **row, "estimate_us": guess.get("us")}
            table.add(facts | {"limit": guess.get("limit"), "bytes_us": floor, "lost_us": row["us"] - floor})
    return True


def by_loss(rows: list[dict[str, Any]], most: int = 40) -> list[str]:
    """Return the launches as a table, what loses most first."""
    found = sorted((row for row in rows if "lost_us" in row), key=lambda row: -row["lost_us"])
    shown = ["| kernel | layer | K | N | µs | estimated | its bytes | lost |", "| --- | --- |" + " ---: |" * 6]
    for row in found[:most]:
        guess = "" if row["estimate_us"] is None else f"{row['estimate_us']:.0f}"
        times = f"{row['us']:.1f} | {guess} | {row['bytes_us']:.1f} | {row['lost_us']:.1f}"
        shown.append(f"| {row['kernel']} | {row['layer']} | {row['K']} | {row['N']} | {times} |")
    return shown
