"""A command's own script from end to end without a GPU: at tiny sizes on the CPU, `layers` in plain
torch, the kernels of `figures` in Triton's interpreter.

    python -m benchmarks.gpu layers --rehearse --tiny --out FOLDER

The records are in FOLDER/tiny, beside those of a GPU, and their times mean nothing. What is shown:
every row is on the disk before the next, what there was no time for is named, the same command goes
on from there (`layers`), the tables are printed.
"""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

T, LEAST = 32, 64
SHRINKS = 64
"""What K and N are divided by; LEAST is kept."""


def small(size: int) -> int:
    """Return a size of a rehearsal."""
    return max(LEAST, size // SHRINKS)


def rehearsed(command: str, out: Path) -> int:
    """Run `layers` or `figures` on the CPU, first with no time, then to the end; 0: as wanted."""
    from benchmarks.gpu import figures, layers
    from benchmarks.timing import CpuClock

    shapes = tuple(dict.fromkeys((small(K), small(N)) for K, N in figures.SHAPES))
    if command == "layers":
        cases = list(dict.fromkeys(replace(c, T=T, K=small(c.K), N=small(c.N)) for c in layers.cases()))
        budget = replace(layers.BUDGET, seconds=0.0, least=1, most=1)

        def run(until: float) -> int:
            with patch.object(layers, "cases", lambda: iter(cases)), patch.object(layers, "BUDGET", budget):
                return layers.run(out / "layers.json", {"device": "cpu"}, "cpu", CpuClock(), until)

        return _stopped_and_resumed(run, len(cases) + 1)
    from benchmarks import kernel_figures
    from benchmarks.gpu.rows import Rows

    tiny = [layer._replace(T=T, K=small(layer.K), N=small(layer.N)) for layer in figures.layers()]
    once = replace(figures.TIMED, least=1, most=1)
    table = Rows(out, "figures", {"device": "cpu"})
    with (
        patch.object(figures, "SHAPES", shapes),
        patch.object(figures, "layers", lambda: iter(tiny)),
        patch.object(figures, "TIMED", once),
        patch.object(figures.launches, "__defaults__", (once,)),
        patch.object(kernel_figures, "TOKENS", T),
    ):
        late = figures.measure(table, "cpu", CpuClock(), time.monotonic() - 1)
        whole = figures.measure(table, "cpu", CpuClock(), time.monotonic() + 3600)
    print(*figures.by_loss(table.rows), sep="\n")
    failed = [row for row in table.rows if "failed" in row]
    print(f"figures: {len(table.rows)} rows, {len(failed)} that raised; late: {not late}, to the end: {whole}")
    return 0 if whole and not late and not failed else 1


def _stopped_and_resumed(run: Callable[[float], int], wanted: int) -> int:
    first = run(time.monotonic() - 1)
    second = run(time.monotonic() + 3600)
    print(f"layers: {wanted} wanted; with no time exit {first}, again exit {second}")
    return 0 if (first, second) == (3, 0) else 1
