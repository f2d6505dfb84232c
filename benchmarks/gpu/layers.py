"""Whole layers beside their rivals: frozen, PEFT, PEFT under torch.compile, addmm, ours; one whole
model at the end. A record as those of `benchmarks.run`.
"""

import time
from collections.abc import Iterator
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
    other ranks and shapes. torch.compile's rival, which takes long to build, runs at the first
    alone.
    """
    for place in PLACES:
        first = place == PLACES[0]
        for r in (16, 64):
            for method in ("lora", "dora", "delora"):
                yield _case(method, place, T, r, precision, compiled=first and r == 16)
        yield _case("goat", place, T, 2, precision, E=8, k=2)
        yield _case("ether-plus-both", place, T, 0, precision, n_blocks=1)


def layers() -> list[Layer]:
    """Return them as what is compiled ahead."""
    return [Layer(case.method, case.K, case.N, case.r, E=case.E, k=case.k) for case in cases()]


def run(out: Path, machine: dict[str, Any], device: str, clock: Clock, until: float, most: int | None = None) -> int:
    """Measure until the time is over, then the model, and write the record; a partial file of the
    same run goes on. 0: all were done, 3: not all.
    """
    wanted = list(cases())[:most]
    partial = Partial(out, {"set": "gpu layers", "impls": list(IMPLEMENTATIONS)}, machine)
    if not partial.begun:
        partial.begin(**_ceilings(device, clock))
    left = []
    for case in wanted:
        if case.key in partial.done:
            continue
        if time.monotonic() > until:
            left.append(case.key)
            continue
        rows = measure(case, device, clock, BUDGET, IMPLEMENTATIONS)
        partial.add(case.key, rows)
        print(case.key, *(line(row) for row in rows if row["impl"] in IMPLEMENTATIONS), sep="\n", flush=True)
    model = model_cases("quick", ("lora",), device, partial.header["machine"]["half"])[0]
    if time.monotonic() < until and model.key not in partial.done and most is None:
        rows = measure_model(model, device, clock, BUDGET, ("peft", "dk"))
        partial.add(model.key, rows)
        print(model.key, *map(line, rows), sep="\n", flush=True)
    elif model.key not in partial.done:
        left.append(model.key)
    if left:
        print(f"not begun in time: {'; '.join(left)}")
    partial.finish(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), left=left)
    return 3 if left else 0


def line(row: dict[str, Any]) -> str:
    """Return a row as people read it."""
    if row["status"] != "ok" or row["median_ms"] is None:
        return f"    {row['impl']:<14} {row['status']}: {row['note']}"
    ratio = "" if row["ratio_to_frozen"] is None else f"  {row['ratio_to_frozen']:.3f} of frozen"
    return f"    {row['impl']:<14} {row['median_ms']:8.3f} ms{ratio}"
