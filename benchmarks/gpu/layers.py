"""Whole layers beside their rivals: frozen, PEFT, PEFT under torch.compile, addmm, ours; one whole
model at the end. A record as those of `benchmarks.run`.
"""

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.cases import Case, _case
from benchmarks.codegen.calls import Layer
from benchmarks.layer.measure import measure
from benchmarks.model_cases import model_cases
from benchmarks.record import Partial
from benchmarks.run import _ceilings
from benchmarks.timing import Budget, Clock
from benchmarks.whole_model import measure_model

IMPLEMENTATIONS = ("frozen", "peft", "peft-compile", "addmm", "dk")
PLACES = ("llama3-8b.q", "llama3-8b.up", "llama3-8b.down", "llama3-70b.q")
BUDGET = Budget(seconds=0.25, least=7, most=40)


def cases(T: int = 8192, precision: str = "bf16-autocast") -> Iterator[Case]:
    """Yield the layers, the most telling first: every method at rank 16 and one shape, then the
    other ranks and shapes. torch.compile's rival takes long to build, and runs for LoRA alone.
    """
    for place in PLACES:
        for r in (16, 64):
            for method in ("lora", "dora", "delora"):
                first = place == PLACES[0] and r == 16 and method == "lora"
                yield _case(method, place, T, r, precision, compiled=first)
        yield _case("goat", place, T, 2, precision, E=8, k=2)
        yield _case("ether-plus-both", place, T, 0, precision, n_blocks=1)


def layers() -> list[Layer]:
    """Return them as what is compiled ahead."""
    return [Layer(case.method, case.K, case.N, case.r, E=case.E, k=case.k) for case in cases()]


def run(out: Path, machine: dict[str, Any], device: str, clock: Clock, until: float, most: int | None = None) -> int:
    """Measure until the time is over, the model after the first shape, and write the record. Where
    something is left over, the partial file stays: the same command goes on from it. 0: all were
    done, 3: not all.
    """
    wanted = list(cases())[:most]
    partial = Partial(out, {"set": "gpu layers", "impls": list(IMPLEMENTATIONS)}, machine)
    if not partial.begun:
        partial.begin(**_ceilings(device, clock))
    model = replace(model_cases("quick", ("lora",), device, partial.header["machine"]["half"])[0], limit_mib=None)
    todo: list[Any] = list(wanted)
    if most is None:
        todo.insert(sum(case.shape == PLACES[0] for case in wanted), model)
    left = []
    for case in todo:
        if case.key in partial.done:
            continue
        if time.monotonic() > until:
            left.append(case.key)
            continue
        if case is model:
            rows = measure_model(model, device, clock, BUDGET, ("peft", "dk"))
        else:
            rows = measure(case, device, clock, BUDGET, IMPLEMENTATIONS)
        partial.add(case.key, rows)
        shown = [row for row in rows if case is model or row["impl"] in IMPLEMENTATIONS]
        print(case.key, *map(line, shown), sep="\n", flush=True)
    if left:
        print(f"not begun in time: {'; '.join(left)}", flush=True)
    finished = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    partial.finish(keep=bool(left), finished=finished, left=left)
    return 3 if left else 0


def line(row: dict[str, Any]) -> str:
    """Return a row as people read it."""
    if row["status"] != "ok" or row["median_ms"] is None:
        return f"    {row['impl']:<14} {row['status']}: {row['note']}"
    ratio = "" if row["ratio_to_frozen"] is None else f"  {row['ratio_to_frozen']:.3f} of frozen"
    return f"    {row['impl']:<14} {row['median_ms']:8.3f} ms{ratio}"
