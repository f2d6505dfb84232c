"""Use fifteen minutes of a GPU: four commands, back to back on one start of the machine.

    python -m benchmarks.gpu right --out runs/gpu    every op and method, the sanitizer: 3 minutes
    python -m benchmarks.gpu figures --out runs/gpu  GEMMs, each launch beside its estimate: 2.5
    python -m benchmarks.gpu layers --out runs/gpu   layers beside their rivals, one model: 3.5
    python -m benchmarks.gpu tune --out runs/gpu     goes on where it stopped, as long as it may
    python -m benchmarks.gpu figures --rehearse      no GPU: compiles what would be launched

Minutes hold compiling too (in parallel, only what is launched). Each writes its file after every
row and stops in time: what is missing is named, and the exit status is 3.
"""

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {"right": 3.0, "figures": 2.5, "layers": 3.5, "tune": 5.0}
"""Command → minutes, compiling included."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0: done, 1: something is wrong, 2: no GPU, 3: not all done in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=COMMANDS)
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the records [%(default)s]")
    add("--minutes", type=float, help="when to stop, compiling included [3, 2.5, 3.5, 5]")
    add("--backend", nargs="+", default=["triton"], help="of right [%(default)s]")
    add("--rehearse", action="store_true", help="without a GPU: how much is compiled, and in what time")
    add("--workers", type=int, help="processes that compile; default: one for each core")
    options = parser.parse_args(argv)
    os.environ["DELORA_KERNELS_BACKEND"] = "triton"  # unproved: a proof compiles for longer than this may take
    began = time.monotonic()
    seconds = 60 * (options.minutes or COMMANDS[options.command])
    if options.rehearse:
        return _rehearsed(options)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none (--rehearse does without)", file=sys.stderr)
        return 2
    return _run(options, began, began + seconds)


def _rehearsed(options: argparse.Namespace) -> int:
    from benchmarks.gpu import figures, layers, ready, right

    if options.command == "right":
        found = right.jobs(options.backend, right.Setting("cuda", 0))
        print(f"{len(found)} jobs:", *(f"  {job.name}" for job in found), sep="\n")
        return 0
    if options.command == "tune":
        from benchmarks import tune_tiles

        for name, limit in tune_tiles.jobs((9, 0)):
            print(f"{name} {limit}: {len(tune_tiles.candidates_of((9, 0), name, limit))} variants to compile")
        return 0
    wanted = figures.layers() if options.command == "figures" else layers.layers()
    with tempfile.TemporaryDirectory() as cache:  # an empty one: that is what takes time
        os.environ["TRITON_CACHE_DIR"] = cache
        done = ready.compile_ahead(ready.binaries_of(wanted), workers=options.workers)
    print(f"{options.command}: {done.says()}")
    return 1 if done.failed else 0


def _run(options: argparse.Namespace, began: float, until: float) -> int:
    import torch

    from benchmarks.gpu import figures, layers, ready, right
    from benchmarks.gpu.rows import Rows
    from benchmarks.machine import machine_info
    from benchmarks.timing import clock_of

    machine: dict[str, Any] = dict(machine_info("cuda"))
    if options.command == "right":
        setting = right.Setting("cuda", int(time.time()) % 10**6)
        table = Rows(options.out, "right", machine | {"seed": setting.seed})
        found = right.jobs(options.backend, setting)
        return right.run(found, setting, table, until - time.monotonic(), options.workers)
    if options.command == "tune":
        from benchmarks import tune

        os.environ.pop("DELORA_KERNELS_BACKEND")
        return tune.main(["--state", str(options.out / "tune.json"), "--seconds", str(until - time.monotonic())])
    capability = torch.cuda.get_device_capability()
    wanted = list(figures.layers() if options.command == "figures" else layers.layers())
    done = ready.compile_ahead(ready.binaries_of(wanted, capability), capability, options.workers)
    print(done.says(), flush=True)
    machine |= {"variants": done.variants, "compile_seconds": done.seconds, "not_compiled": done.failed}
    if options.command == "layers":
        return layers.run(options.out / "layers.json", machine, "cuda", clock_of("cuda"), until)
    table = Rows(options.out, "figures", machine)
    whole = figures.measure(table, "cuda", clock_of("cuda"), until, _estimated(wanted, options))
    print(*figures.by_loss(table.rows), sep="\n")
    table.note(seconds=time.monotonic() - began)
    return 0 if whole else 3


def _estimated(wanted: list[Any], options: argparse.Namespace) -> dict[tuple[str, int, int], list[dict[str, Any]]]:
    """Return the estimates of these layers' launches; none where nothing disassembles."""
    from benchmarks.codegen import estimates

    try:
        found = estimates.estimates_of(wanted, options.workers)
    except (OSError, RuntimeError, ValueError) as error:
        print(f"no estimates: {error}")
        return {}
    rows = [(layer, estimates.row_of(layer, estimate)) for layer, estimate in found]
    return {(layer.title, layer.K, layer.N): row["kernels"] for layer, row in rows}


if __name__ == "__main__":
    sys.exit(main())
