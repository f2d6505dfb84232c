"""The binaries that real calls launch, measured: `python -m benchmarks.codegen --launched`."""

import argparse
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.codegen.calls import Layer, looked_at, steps_of
from benchmarks.codegen.compiling import compiled_all
from benchmarks.codegen.estimate import kernel_of
from benchmarks.codegen.exceptions import EXCEPTIONS
from benchmarks.codegen.limits import beyond, judged
from benchmarks.codegen.measures import measured
from benchmarks.codegen.recording import Launch

Row = dict[str, Any]


def rows_of(
    kernels: list[str] | None = None, layers: Iterable[Layer] | None = None, workers: int | None = None
) -> list[Row]:
    """Record, compile and measure; for each binary the launch with the most programs stands."""
    largest: dict[str, tuple[Launch, str]] = {}
    for layer in looked_at() if layers is None else layers:
        for step in steps_of(layer):
            if isinstance(step, Launch) and (kernels is None or step.binary.kernel.removesuffix("_kernel") in kernels):
                title = f"{layer.title} {layer.K}x{layer.N}"
                if step.binary.key not in largest:
                    largest[step.binary.key] = step, title
    made = compiled_all((launch.binary for launch, _ in largest.values()), workers)
    rows = []
    for key, (launch, title) in largest.items():
        time = kernel_of(launch, made[key])
        times = {"estimate_us": time.total, "bytes_us": time.bytes, "matrix_us": time.matrix, "limit": time.limit}
        rows.append(measured(launch, made[key]) | {"of": title} | times)
    return rows


def lines(rows: list[Row]) -> list[str]:
    """Return the table as people read it."""
    shown = [
        "kernel           of                             regs  shared thr  CTA(run)  inflight bar shf  sc  ser"
        " instr  /KB   cyc  µs(bytes) not ahead; products; config"
    ]
    for row in rows:
        by = "/".join(str(row["ctas_by"][name]) for name in ("registers", "shared", "threads"))
        products = " ".join(f"{count}×{name}" for name, count in row["mma"].items()) or "-"
        dense = "-" if row["instructions_per_kb"] is None else f"{row['instructions_per_kb']:.0f}"
        shown.append(
            f"{row['kernel']:<16} {row['of']:<30} {row['registers']:>4}{'!' if row['spill_bytes'] else ' '}"
            f"{row['shared_bytes']:>7} {row['threads']:>3} {by:>8}({row['ctas_running']})"
            f" {row['in_flight_bytes'] / 1024:>6.1f}K {row['barriers_per_step']:>3} {row['shuffles_per_step']:>3}"
            f" {row['scalar_loads']:>3} {row['serialized_mma']:>3} {row['instructions_per_step']:>6} {dense:>5}"
            f" {row['cycles_per_step']:>5} {row['estimate_us']:>5.1f}({row['bytes_us']:.0f})"
            f" {','.join(row['not_ahead']) or '-'}; {products}; {row['config']}"
        )
    return shown


def main(argv: list[str]) -> int:
    """Measure, print, write the record."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.codegen --launched", description=__doc__)
    parser.add_argument("--kernel", action="append", help="times_small, ...; default: all")
    parser.add_argument("--layer", action="append", help="words of a layer's title, as in 'lora r=16'; default: all")
    parser.add_argument("--workers", type=int, help="processes that compile; default: one for each core")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    wanted = [layer for layer in looked_at() if not options.layer or layer.title in options.layer]
    rows = rows_of(options.kernel, wanted, options.workers)
    print(*lines(rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    new, idle = judged(rows, EXCEPTIONS, complete=not (options.kernel or options.layer))
    for each in idle:
        print(f"no longer needed: {each.kernel} of {each.of} ({each.measures})")
    reasons = {(row["kernel"], row["of"]): beyond(row) for row in rows}
    for each in new:
        found = reasons[each.kernel, each.of]
        print(f"FAILED: {each.kernel} of {each.of}: " + "; ".join(f"{name}: {text}" for name, text in found.items()))
    if new:
        print("As exceptions:", *(f"    {tuple(each)!r}," for each in new), sep="\n")
    return 1 if new else 0
