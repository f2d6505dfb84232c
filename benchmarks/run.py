"""Measure throughput and memory of every method against its rivals, on this machine.

    python -m benchmarks.run --set quick                                # a CPU: minutes
    python -m benchmarks.run --set standard --methods lora dora --out FILE
    python -m benchmarks.report FILE                                    # tables and plots of it

A run that was killed goes on where it was when the same command is given again.
"""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks.busy import wait_politely_if_busy

if __name__ == "__main__":
    wait_politely_if_busy()  # before what follows imports torch

from benchmarks.cases import SETS, cases
from benchmarks.layer.methods import METHODS
from benchmarks.record import Mismatch, Partial, Row
from benchmarks.report.tables import requirements

SECONDS = {"quick": 1.0, "standard": 2.0, "full": 3.0}
"""How long the timing of a case may last after its least number of rounds, plain and as CUDA graphs
together.
"""

OURS = ("dk", "frozen")
"""How the names of those begin whose failure is the exit status; without its frozen linear a case
is not judged.
"""


class Paused(Exception):
    """The time that was given is over; the text says what is there and what to do."""


@dataclass(frozen=True)
class Job:
    """One thing to measure: its name in the partial file, its share of the progress bar, how."""

    key: str
    weight: float
    run: Callable[[], list[Row]]


def main(argv: Sequence[str] | None = None) -> int:
    """Run a set and write its record; 0: done, 1: something of ours was refused or broke, 2: bad
    input, 3: paused.
    """
    args = _parser().parse_args(argv)
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        record = run(args, device)
    except (Mismatch, Paused) as stopped:
        print(f"benchmarks.run: {stopped}", file=sys.stderr)
        return 2 if isinstance(stopped, Mismatch) else 3
    rows = record["rows"]
    bad = [row for row in rows if row["status"] in ("failed", "error")]
    for row in bad:
        print(f"{row['status']}: {row['method']} {row['impl']} T={row['T']} {row['precision']}: {row['note']}")
    print("\n".join(requirements(rows, record["machine"])), end="")
    ours = [row for row in bad if row["impl"].startswith(OURS)]
    print(f"{len(rows)} rows, {len(ours)} of ours failed, {len(bad) - len(ours)} of others → {args.out}")
    return 1 if ours else 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--set", dest="which", choices=SETS, default="quick", help="how much is measured [%(default)s]")
    add("--methods", nargs="+", choices=list(METHODS), default=list(METHODS), help="adapter methods [all]")
    add("--impls", nargs="+", default=[], metavar="IMPL", help="implementations beside `frozen` [all]")
    add("--only", choices=("layer", "model"), help="layers alone, or whole models alone [both]")
    add("--out", type=Path, default=Path("runs/bench.json"), help="the record [%(default)s]")
    add("--device", help="cpu, cuda, ... [a GPU if there is one]")
    add("--threads", type=int, help="CPU threads [torch's choice]")
    add("--seconds", type=float, help="of timing a case, beyond its least number of rounds")
    add("--minutes", type=float, help="begin no case after this long; the same command goes on where it stopped")
    add("--limit", type=int, metavar="N", help="the first N cases alone: a trial")
    return parser


def run(args: argparse.Namespace, device: str) -> dict[str, Any]:
    """Measure what the arguments ask for.

    Returns:
        The record.

    Raises:
        Paused: `args.minutes` are over.
    """
    from tqdm import tqdm

    from benchmarks.machine import machine_info
    from benchmarks.model import roofline_fraction
    from benchmarks.timing import clock_of

    began, clock = monotonic(), clock_of(device)
    partial_file = Partial(args.out, _settings(args), machine_info(device))
    if not partial_file.begun:
        partial_file.begin(**_ceilings(device, clock))
    todo = jobs(args, device, partial_file.header["machine"]["half"], clock)
    shown = "{percentage:3.0f}% |{bar:20}| {elapsed}, {remaining} left  {desc}"
    with tqdm(total=sum(job.weight for job in todo), bar_format=shown, file=sys.stderr) as bar:
        for job in todo:
            bar.set_description_str(job.key[:90])
            if job.key not in partial_file.done:
                if args.minutes is not None and monotonic() - began >= 60 * args.minutes:
                    done = f"{len(partial_file.done)} of {len(todo)} cases are in {partial_file.path}"
                    raise Paused(f"{done}; give the same command again")
                rows = job.run()
                for row in rows:
                    if row["kind"] == "layer":
                        row["roofline"] = roofline_fraction(row, partial_file.header["machine"])
                partial_file.add(job.key, rows)
            bar.update(job.weight)
        bar.set_description_str("done")
    return partial_file.finish(finished=time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    wanted = ("which", "methods", "impls", "only", "seconds", "limit")
    return {"set" if name == "which" else name: getattr(args, name) for name in wanted}


def _ceilings(device: str, clock: Any) -> dict[str, Any]:
    """Return what this device can do, and the dtype that is worth measuring on it."""
    from benchmarks.ceilings import copy_tbps, gemm_tflops, half_precision

    half = half_precision(device, clock)
    gemm = gemm_tflops(device, clock, (half,) if half == "fp32" else (half, "fp32"))
    return {
        "half": half,
        "copy_tbps": copy_tbps(device, clock),
        "gemm_tflops": gemm[half],
        "gemm_tflops_by_dtype": gemm,
    }


def jobs(args: argparse.Namespace, device: str, half: str, clock: Any) -> list[Job]:
    """Everything to measure, in order."""
    from benchmarks.layer.measure import measure
    from benchmarks.model_cases import model_cases
    from benchmarks.timing import Budget
    from benchmarks.whole_model import measure_model

    seconds = args.seconds if args.seconds is not None else SECONDS[args.which]
    budget = Budget(seconds=seconds / 2 if device.startswith("cuda") else seconds)
    found = []
    if args.only != "model":
        for case in cases(args.which, tuple(args.methods), device, half):
            run_case = partial(measure, case, device, clock, budget, tuple(args.impls))
            found.append(Job(case.key, 1e9 + case.work, run_case))
    if args.only != "layer":
        methods = tuple(name for name in args.methods if METHODS[name].peft_config is not None)
        for model in model_cases(args.which, methods, device, half):
            run_model = partial(measure_model, model, device, clock, budget, tuple(args.impls))
            found.append(Job(model.key, 1e9 + 3 * model.work, run_model))
    return found[: args.limit]


if __name__ == "__main__":
    sys.exit(main())
