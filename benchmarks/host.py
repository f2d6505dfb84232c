"""What a call costs the host: microseconds and Python calls of a forward and backward pass.

    python -m benchmarks.host                 # in front of stand-ins: no GPU is asked for
    python -m benchmarks.host --layers        # PEFT's modules too, before and after accelerate()
    python -m benchmarks.host --method lora --precision bf16 --rounds 200 --out runs/host.json

On a GPU a layer of few tokens takes as long as its host takes to launch it. Here nobody runs the
kernels: Triton's end where the driver would be called, the CUDA library's in a C function that
takes any arguments (benchmarks/stand_in.py). What is left is the library's own time, with that of
torch and of library GEMMs so small that a CPU makes them in a few microseconds. A pass is forward
(under autocast, where the precision says so), backward, and the gradients given back: of `frozen`
(a linear), `addmm` (a bare autograd Function, benchmarks/layer/addmm.py), of our function on each
backend, and with --layers of PEFT's module (`peft`) and of the same one after accelerate()
(`layer`), in turn. Intervals hold 95 % of what the rounds give when they are drawn anew.

Calls are those of Python functions and, behind them, of C functions that Python code calls: unlike
the time they have no noise.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.cases import PRECISIONS, Case
from benchmarks.layer.addmm import addmm
from benchmarks.layer.methods import METHODS, inputs, peft_layer
from benchmarks.machine import machine_info
from benchmarks.overhead import interval
from benchmarks.stand_in import cuda_standing_in, standing_in
from benchmarks.timing import Budget, rounds
from delora_kernels import accelerate, functional, use_backend

BACKENDS = ("triton", "cuda", "eager")
SHOWN = ("lora", "dora", "delora", "moe")
SIZES: dict[str, int] = {"T": 2, "K": 128, "N": 8, "r": 4}
"""So small that a CPU makes a product in 16 bits in the 10 µs that a GPU's library takes to launch
it, and yet so that sums over K are split among programs, as they are in real layers.
"""


REPEATS = 20
"""Passes between two looks at the clock."""


class ProcessClock:
    """CPU time of this process, all threads of it, for REPEATS of each pass: what a busy machine
    does meanwhile does not count. What the passes left on a device ends outside.
    """

    def round(self, passes: Mapping[str, Callable[[], Any]]) -> dict[str, tuple[float, float | None] | Exception]:
        """Milliseconds of one repetition."""
        spent: dict[str, tuple[float, float | None] | Exception] = {}
        for name, run in passes.items():
            start = time.process_time()
            for _ in range(REPEATS):
                run()
            spent[name] = 1e3 * (time.process_time() - start) / REPEATS, None
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        return spent


class Calls(NamedTuple):
    """How often Python functions were called, and C functions by Python code."""

    python: int
    c: int


def counted(run: Callable[[], Any]) -> Calls:
    """Return the calls of one run, on this thread."""
    found = {"call": 0, "c_call": 0}

    def see(frame: FrameType, event: str, argument: Any) -> None:
        if event in found:
            found[event] += 1

    sys.setprofile(see)
    try:
        run()
    finally:
        sys.setprofile(None)
    return Calls(found["call"] - 1, found["c_call"] - 1)  # without run's own frame and setprofile(None)


@contextmanager
def on(backend: str) -> Iterator[None]:
    """Every call runs on this backend; where it needs a GPU that is not here, in front of a
    stand-in.
    """
    stand_ins: dict[str, Callable[[], Any]] = {"triton": standing_in, "cuda": cuda_standing_in}
    here = backend == "eager" or torch.cuda.is_available()
    with nullcontext() if here else stand_ins[backend](), use_backend(backend):
        yield


def passes(method: str, precision: str, device: str, layers: bool = False) -> dict[str, Callable[[], None]]:
    """Return name → forward and backward, the gradients given back."""
    mixture = {"E": 4, "k": 2} if method in ("moe", "goat") else {}
    case = Case(method, "{K}x{N}".format(**SIZES), **SIZES, **mixture, precision=precision)  # type: ignore[arg-type]
    made = inputs(case, device, seed=0)
    dy, spec = made.pop("grad_out"), METHODS[method]
    leaves = [made[name].requires_grad_() for name in ("x", *spec.trained)]
    dtype, _, autocast, _ = PRECISIONS[precision]
    forwards: dict[str, Callable[[], Any]] = {
        "frozen": lambda: torch.nn.functional.linear(made["x"], made["weight"]),
        "addmm": lambda: addmm(made),
        "dk": lambda: getattr(functional, spec.function)(**made),
    }
    if mixture:
        del forwards["addmm"]
    if layers and METHODS[method].peft_config is not None:
        plain, ours = peft_layer(case, made), peft_layer(case, made)
        accelerate(torch.nn.Sequential(ours), strict=True)
        forwards |= {"peft": lambda: plain(made["x"]), "layer": lambda: ours(made["x"])}
        leaves += [each for layer in (plain, ours) for each in layer.parameters() if each.requires_grad]

    def step(forward: Callable[[], Any]) -> None:
        if autocast:
            with torch.autocast(device, dtype):
                y = forward()
        else:
            y = forward()
        (y if isinstance(y, Tensor) else y[0]).backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return {name: lambda forward=forward: step(forward) for name, forward in forwards.items()}  # type: ignore[misc]


def measure(method: str, backend: str, precision: str, budget: Budget, layers: bool = False) -> list[dict[str, Any]]:
    """Return a row for each implementation: µs, Python calls, over addmm with its interval."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    with on(backend):
        steps = passes(method, precision, device, layers)
        for _ in range(5):  # kernels are compiled, what is looked up once is, and calls are planned
            for step in steps.values():
                step()
        calls = {name: counted(step) for name, step in steps.items()}
        found = rounds(steps, ProcessClock(), budget)
    times = {name: [ms for ms, _ in spent] for name, spent in found.items()}
    rows = []
    for name, spent in times.items():
        own = name in ("dk", "layer")
        row: dict[str, Any] = {"method": method, "impl": f"{name}-{backend}" if own else name}
        row |= {"backend": backend, "precision": precision, **SIZES, "rounds": len(spent)}
        row |= {"host_us": 1e3 * statistics.median(spent)}
        row |= {"python_calls": calls[name].python, "c_calls": calls[name].c, "ratio_to_addmm": None}
        if "addmm" in times:
            ratio = interval(lambda medians, name=name: medians[name] / medians["addmm"], times)  # type: ignore[misc]
            row |= {"ratio_to_addmm": ratio[0], "addmm_interval": ratio[1:]}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as people read them, one for each method and backend."""
    layers = any(row["impl"] == "peft" for row in rows)
    shown = Table("method", "backend", "frozen, µs", "addmm, µs", "dk, µs", "dk / addmm", "calls: addmm", "dk")
    for column in ("PEFT, µs", "layer, µs", "layer / addmm", "calls: PEFT", "layer") if layers else ():
        shown.add_column(column)
    for method, backend in dict.fromkeys((row["method"], row["backend"]) for row in rows):
        of = {row["impl"]: row for row in rows if (row["method"], row["backend"]) == (method, backend)}
        cells = [_spent(of.get("frozen")), *_compared(of.get("addmm"), of[f"dk-{backend}"])]
        if layers:
            cells += _compared(of.get("peft"), of.get(f"layer-{backend}"))
        shown.add_row(method, backend, *cells)
    return shown


def _spent(row: Mapping[str, Any] | None) -> str:
    return "" if row is None else f"{row['host_us']:.0f}"


def _compared(rival: Mapping[str, Any] | None, ours: Mapping[str, Any] | None) -> list[str]:
    """µs of both, ours over addmm, the calls of both."""
    ratio = ""
    if ours is not None and ours["ratio_to_addmm"] is not None:
        ratio = "{:.2f} ({:.2f} to {:.2f})".format(ours["ratio_to_addmm"], *ours["addmm_interval"])
    calls = ["" if row is None else f"{row['python_calls']} + {row['c_calls']}" for row in (rival, ours)]
    return [_spent(rival), _spent(ours), ratio, *calls]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=tuple(METHODS), action="append", help=f"default: {' '.join(SHOWN)}")
    parser.add_argument("--backend", choices=BACKENDS, action="append", help="default: all of them")
    parser.add_argument("--precision", choices=tuple(PRECISIONS), default="bf16-autocast", help="default: %(default)s")
    parser.add_argument("--layers", action="store_true", help="PEFT's modules too, before and after accelerate()")
    parser.add_argument("--rounds", type=int, default=60, help="default: 60, of 20 passes each")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds)
    rows: list[dict[str, Any]] = []
    for method in options.method or SHOWN:
        for backend in options.backend or BACKENDS:
            rows += measure(method, backend, options.precision, budget, options.layers)
    Console(width=200 if options.layers else 120).print(table(rows))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine_info("cuda" if torch.cuda.is_available() else "cpu"), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
