"""One case measured: every implementation judged, weighed and timed → rows of the record.

A row's status is `ok`, `absent` (with the reason), `failed` (beyond the gate's limit: not timed),
`out of memory` or `error`; whatever one implementation does, the others go on.
"""

import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch

from benchmarks.cases import BOTH, Case
from benchmarks.layer.gate import Gate, Verdict
from benchmarks.layer.rivals import FROZEN, YARDSTICKS, Absent, Implementation, Layer
from benchmarks.memory import MIB, allocations, kept_bytes, only_new_garbage
from benchmarks.timing import Budget, Clock, captured, interleaved
from delora_kernels.testing.methods.eager_forms import eager, materialised

Row = dict[str, Any]
Made = TypeVar("Made")

MEASURED: tuple[str, ...] = (
    "median_ms",
    "p20_ms",
    "p80_ms",
    "ratio_to_frozen",
    "peak_mib",
    "saved_mib",
    "error_to_fp64",
)
MEASURED += ("host_ms", "graph_ms", "rounds", "allocated_mib", "backend", "errors", "status", "note")
"""The columns of a row beyond the case's own, `kind` and `impl`."""


@only_new_garbage()
def measure(
    case: Case, device: str, clock: Clock, budget: Budget, only: tuple[str, ...] = (), seed: int = 0
) -> list[Row]:
    """Return the rows of one case.

    Args:
        case: What.
        device: Where.
        clock: Of the device.
        budget: Of its timing.
        only: Implementations wanted; empty: all. The frozen linear is always there.
        seed: Of the numbers.
    """
    bench = _Bench(case, device, seed)
    try:
        layer = Layer(case, device, seed)
        exact = replace(case, dropout_p=0.0)
        gate, gated = Gate(layer), Layer(exact, device, seed) if case.dropout_p else layer
    except Exception as error:
        return [bench.row("frozen") | failure(error)]
    for name in layer.names():
        if not only or name in only or name in FROZEN:
            bench.admit(name, layer, gated, gate)
    del gate, gated
    for name, implementation in list(bench.ready.items()):
        bench.attempt(name, partial(bench.weigh, name, implementation, layer))
    bench.time(clock, budget)
    return list(bench.rows.values())


class _Bench:
    """The rows of one case while they are filled in, and the implementations that are still in the
    running.
    """

    def __init__(self, case: Case, device: str, seed: int) -> None:
        self.case, self.device = case, device
        self.rows: dict[str, Row] = {}
        self.ready: dict[str, Implementation] = {}

    def row(self, name: str) -> Row:
        return {"kind": "layer", "impl": name, **self.case.columns(), **dict.fromkeys(MEASURED), "status": "ok"}

    def attempt(self, name: str, work: Callable[[], Made]) -> Made | None:
        """Return what `work` returns; if it raises, the implementation is out, and its row says
        why.
        """
        try:
            return work()
        except Exception as error:
            self.fail(name, error)
            return None

    def fail(self, name: str, error: Exception) -> None:
        self.rows[name] |= failure(error)
        self.ready.pop(name, None)
        error.__traceback__ = None  # its frames hold tensors
        gc.collect()
        if self.device.startswith("cuda"):
            torch.cuda.empty_cache()

    def admit(self, name: str, layer: Layer, gated: Layer, gate: Gate) -> None:
        """Build an implementation and let the gate judge it."""
        row = self.rows[name] = self.row(name)
        built = self.attempt(name, lambda: layer.implementation(name))
        if built is None:
            return
        if name.startswith("dk"):
            row["backend"] = layer.backend() if name == "dk" else name.removeprefix("dk-")
        if name not in YARDSTICKS:
            verdict = self.attempt(name, lambda: _judge(name, built, gated, layer, gate))
            if verdict is None:
                return
            row |= {"error_to_fp64": verdict.largest, "errors": verdict.errors}
            if verdict.wrong:
                row |= {"status": "failed", "note": verdict.wrong}
                return
        self.ready[name] = built

    def weigh(self, name: str, implementation: Implementation, layer: Layer) -> None:
        weighed = allocations(implementation.run, self.device)
        row = self.rows[name]
        row |= {"peak_mib": weighed.peak / MIB, "allocated_mib": weighed.total / MIB}
        if self.case.mode == BOTH:
            row["saved_mib"] = kept_bytes(implementation.forward, layer.tensors) / MIB

    def time(self, clock: Clock, budget: Budget) -> None:
        passes = {name: implementation.run for name, implementation in self.ready.items()}
        times = interleaved(passes, clock, budget, self.fail)
        graphs = {}
        if self.device.startswith("cuda"):
            for name in times:
                graph = self._graph(name)
                if graph is not None:
                    graphs[name] = graph
        graph_times = interleaved(graphs, clock, budget, self.fail) if graphs else {}
        for name, spent in times.items():
            row = self.rows[name]
            row |= {"median_ms": spent.median_ms, "p20_ms": spent.p20_ms, "p80_ms": spent.p80_ms}
            row |= {"host_ms": spent.host_ms, "rounds": spent.rounds}
            if name in graph_times:
                row["graph_ms"] = graph_times[name].median_ms
            if "frozen" in times:
                row["ratio_to_frozen"] = spent.median_ms / times["frozen"].median_ms

    def _graph(self, name: str) -> Callable[[], Any] | None:
        """Return the pass as a CUDA graph; None with a note in the row where it can't be
        captured.
        """
        try:
            return captured(self.ready[name].run)
        except Exception as error:
            self.rows[name]["note"] = f"no CUDA graph: {_line(error)}"
            return None


def _judge(name: str, built: Implementation, gated: Layer, layer: Layer, gate: Gate) -> Verdict:
    same = gated is layer or name == "peft-no-dropout"
    if name == "authors":
        gate = Gate(layer, (eager, materialised), **layer.conventions(name))
    return gate.judge((built if same else gated.implementation(name)).results())


def failure(error: Exception) -> Row:
    """Return the columns of a row whose implementation raised."""
    if isinstance(error, Absent):
        return {"status": "absent", "note": str(error)}
    status = "out of memory" if out_of_memory(error) else "error"
    empty = dict.fromkeys(("median_ms", "p20_ms", "p80_ms", "ratio_to_frozen"))
    return {"status": status, "note": _line(error), **empty}


def out_of_memory(error: Exception) -> bool:
    """Whether an allocation failed, on a GPU or in torch's CPU allocator."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)


def _line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
