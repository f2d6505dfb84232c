"""Benchmark records: rows of one run with the machine that made them, and the tables README shows of them.

python -m benchmarks.layer.record benchmarks/results/cpu-epyc-2c/FILE.json     # prints the Markdown tables
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.layer.cases import METHODS, PRECISIONS, Case
from benchmarks.layer.measure import MIB, Allocations, Times
from benchmarks.machine import machine_info

NAMES = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA"}


class Record:
    """Rows of one run, one for each layer and implementation."""

    def __init__(self) -> None:
        self.machine = machine_info("cpu")
        self.rows: dict[tuple[Any, ...], dict[str, Any]] = {}

    def add(
        self,
        case: Case,
        impl: str,
        times: Times | None = None,
        frozen: Times | None = None,
        kept: int | None = None,
        allocations: Allocations | None = None,
    ) -> None:
        """Add what was measured of one implementation: times beside the frozen linear's, bytes kept and allocated."""
        shape: dict[str, Any] = {"T": case.T, "K": case.K, "N": case.N, "r": case.r, "E": None}
        row: dict[str, Any] = {"method": case.method, "impl": impl, "mode": "forward+backward", **shape}
        row |= {"dtype": str(case.x.dtype).removeprefix("torch."), "adapter_dtype": "float32"}
        row |= {"precision": case.precision, "median_ms": None, "p20_ms": None, "p80_ms": None, "ratio_to_frozen": None}
        row |= {"saved_mib": None, "peak_mib": None, "allocated_mib": None, "error_to_fp64": None}
        if times is not None and frozen is not None:
            row |= vars(times) | {"ratio_to_frozen": times.median_ms / frozen.median_ms}
        if kept is not None and allocations is not None:
            row |= {"saved_mib": kept / MIB, "peak_mib": allocations.peak / MIB}
            row |= {"allocated_mib": allocations.total / MIB}
        key = (case.method, case.precision, impl, *shape.values())
        self.rows[key] = row

    def write(self, path: str) -> None:
        """Write the record as JSON, without anything that names the machine's user or folders."""
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"machine": self.machine, "rows": list(self.rows.values())}, indent=1)
        Path(path).write_text(text + "\n", encoding="utf-8")


def tables(record: dict[str, Any]) -> str:
    """README's two tables, time and memory, of a record."""
    rows = record["rows"]
    times = [row for row in rows if row["median_ms"] is not None]
    memory = [row for row in rows if row["peak_mib"] is not None]
    lines = _title("Milliseconds, forward + backward; in brackets the part of PEFT's time", times, record["machine"])
    lines += ["| precision | method | frozen linear | PEFT | delora-kernels |", "| --- | --- | ---: | ---: | ---: |"]
    for precision in PRECISIONS:
        for method in METHODS:
            frozen, peft, ours = (_find(times, method, precision, impl) for impl in ("frozen", "peft", "dk"))
            ratio = ours["median_ms"] / peft["median_ms"]
            cells = f"{frozen['median_ms']:.1f} | {peft['median_ms']:.1f} | {ours['median_ms']:.1f} (**{ratio:.2f}**)"
            lines.append(f"| {PRECISIONS[precision]} | {NAMES[method]} | {cells} |")
    lines += ["", *_title("MiB, PEFT → delora-kernels; bf16 base, fp32 adapters, autocast", memory, record["machine"])]
    lines += ["| method | kept for backward | allocated, summed | peak |", "| --- | ---: | ---: | ---: |"]
    for method in METHODS:
        peft, ours = (_find(memory, method, "bf16-autocast", impl) for impl in ("peft", "dk"))
        weights = [f"{peft[key]:.1f} → {ours[key]:.1f}" for key in ("saved_mib", "allocated_mib", "peak_mib")]
        lines.append(f"| {NAMES[method]} | {' | '.join(weights)} |")
    return "\n".join(lines)


def _title(text: str, rows: list[dict[str, Any]], machine: dict[str, Any]) -> list[str]:
    shape = ", ".join(f"{letter}={rows[0][letter]}" for letter in "TKNr")
    versions = f"torch {machine['torch']}, PEFT {machine['peft']}, commit {machine['commit']}"
    return [f"*{text}. {shape}. {machine['cpu']}, {machine['threads']} threads, {versions}.*", ""]


def _find(rows: list[dict[str, Any]], method: str, precision: str, impl: str) -> dict[str, Any]:
    return next(row for row in rows if (row["method"], row["precision"], row["impl"]) == (method, precision, impl))


if __name__ == "__main__":
    record = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    if "rows" not in record:
        sys.exit(f'{sys.argv[1]} is not a record of layers: make one with make bench ARGS="--record FILE"')
    print(tables(record))
