"""Use fifteen minutes of a GPU: four commands, back to back on one start of the machine.

    python -m benchmarks.gpu right --out runs/gpu    every op and method, the sanitizer: 3 minutes
    python -m benchmarks.gpu figures --out runs/gpu  GEMMs, each launch beside its estimate: 2.5
    python -m benchmarks.gpu layers --out runs/gpu   layers beside their rivals, one model: 3.5
    python -m benchmarks.gpu tune --out runs/gpu     goes on where it stopped, as long as it may
    python -m benchmarks.gpu figures --rehearse      no GPU: compiles what would be launched
    python -m benchmarks.gpu layers --rehearse --tiny    no GPU: the script itself, at tiny sizes
    python -m benchmarks.gpu estimates --out runs/gpu    no GPU, before figures or after: estimates
                                                     of its launches, beside what was measured

Minutes hold compiling too (in parallel, only what is launched). Each writes its file after every
row and stops in time: what is missing is named, and the exit status is 3.
"""

import argparse
import json
import os
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMANDS = {"right": 3.0, "figures": 2.5, "layers": 3.5, "tune": 5.0}
"""Command → minutes, compiling included."""
SAMPLE = 32
LIMIT = 400
"""A rehearsal compiles so many kernels of a command that has more than LIMIT of them."""
CORES = 16
"""Of the machine that a rehearsal is for."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; 0: done, 1: something is wrong, 2: no GPU, 3: not all done in time."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("command", choices=[*COMMANDS, "estimates"])
    add("--out", type=Path, default=Path("runs/gpu"), help="folder of the records [%(default)s]")
    add("--minutes", type=float, help="when to stop, compiling included [3, 2.5, 3.5, 5]")
    add("--backend", nargs="+", default=["triton"], help="of right [%(default)s]")
    add("--rehearse", action="store_true", help="without a GPU: how much is compiled, and in what time")
    add("--tiny", action="store_true", help="rehearse layers or figures end to end, at tiny sizes on the CPU")
    add("--workers", type=int, help="processes that compile; default: one for each core")
    options = parser.parse_args(argv)
    os.environ["DELORA_KERNELS_BACKEND"] = "triton"  # unproved: a proof compiles for longer than this may take
    began = time.monotonic()
    if options.command == "estimates":
        return _estimate(options)
    seconds = 60 * (options.minutes or COMMANDS[options.command])
    if options.tiny:
        if not options.rehearse or options.command not in ("layers", "figures"):
            parser.error("--tiny is for a rehearsal of layers or figures")
        # layers on plain torch: the script is rehearsed, and the interpreter would take minutes
        os.environ |= {"DELORA_KERNELS_BACKEND": "eager"} if options.command == "layers" else {"TRITON_INTERPRET": "1"}
        from benchmarks.gpu import tiny

        return tiny.rehearsed(options.command, options.out / "tiny")  # beside records of a GPU, never in their place
    if options.rehearse:
        return _rehearsed(options)
    import torch

    if not torch.cuda.is_available():
        print("benchmarks.gpu needs a CUDA device, and there is none (--rehearse does without)", file=sys.stderr)
        return 2
    return _run(options, began, began + seconds)


def _rehearsed(options: argparse.Namespace) -> int:
    from benchmarks.gpu import figures, layers, ready, right

    minutes = options.minutes or COMMANDS[options.command]
    if options.command == "tune":
        from benchmarks import tune_tiles

        for name, limit in tune_tiles.jobs((9, 0)):
            print(f"{name} {limit}: {len(tune_tiles.candidates_of((9, 0), name, limit))} variants to compile")
        return 0
    if options.command == "right":
        setting = right.Setting("cuda", 0)
        found = right.jobs(options.backend, setting)
        print(f"{len(found)} jobs:", *(f"  {job.name}" for job in found), sep="\n")
        binaries = right.binaries(setting) if "triton" in options.backend else []
    else:
        wanted = figures.layers() if options.command == "figures" else layers.layers()
        binaries = ready.binaries_of(wanted)
        binaries += figures.gemm_binaries() if options.command == "figures" else []
    chosen = binaries if len(binaries) <= LIMIT else random.Random(0).sample(binaries, SAMPLE)
    with tempfile.TemporaryDirectory() as cache:  # an empty one: that is what takes time
        os.environ["TRITON_CACHE_DIR"] = cache
        done = ready.compile_ahead(chosen, workers=options.workers)
    work = done.work * len(binaries) / max(1, len(chosen))
    print(f"{options.command}: {done.says()}")
    print(
        f"{options.command}: {len(binaries)} variants in all, {work:.0f} s of one core's work, {work / CORES:.0f} s on "
        f"{CORES} cores, of the command's {60 * minutes:.0f} s"
    )
    return 1 if done.failed else 0


def _estimate(options: argparse.Namespace) -> int:
    """Write estimates.json if there is none, and add it to figures.json if there is one."""
    from benchmarks.gpu import figures
    from benchmarks.gpu.rows import Rows
    from benchmarks.machine import machine_info

    options.out.mkdir(parents=True, exist_ok=True)
    path, measured = options.out / "estimates.json", options.out / "figures.json"
    if not path.exists():
        rows = figures.estimated(list(figures.layers()), options.workers)
        text = json.dumps({"commit": machine_info("cpu")["commit"], "rows": rows}, indent=1)
        path.write_text(text + "\n", encoding="utf-8")
        print(f"{len(rows)} layers are estimated in {path}")
    if measured.exists():
        table = Rows.of(measured)
        _add_estimates(table, path)
        print(*figures.by_loss(table.rows), sep="\n")
    return 0


def _add_estimates(table: Any, path: Path) -> None:
    """Add what was estimated to rows that are on the disk."""
    from benchmarks.gpu import figures

    if not path.exists():
        print(f"no estimates in {path}: `python -m benchmarks.gpu estimates` adds them, on any machine")
        return
    found, rows = json.loads(path.read_text(encoding="utf-8")), table.rows
    figures.add_estimates(rows, found["rows"])
    table.change(rows)
    table.note(estimates_of=found["commit"])


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
        # not the library's own file: a changed tree is another commit, from which no state goes on
        files = ["--state", str(options.out / "tune.json"), "--out", str(options.out / "tuned.py")]
        return tune.main([*files, "--seconds", str(until - time.monotonic())])
    capability = torch.cuda.get_device_capability()
    wanted = list(figures.layers() if options.command == "figures" else layers.layers())
    binaries = ready.binaries_of(wanted, capability)
    binaries += figures.gemm_binaries(capability) if options.command == "figures" else []
    done = ready.compile_ahead(binaries, capability, options.workers)
    print(done.says(), flush=True)
    machine |= {"variants": done.variants, "compile_seconds": done.seconds, "not_compiled": done.failed}
    if options.command == "layers":
        return layers.run(options.out / "layers.json", machine, "cuda", clock_of("cuda"), until)
    table = Rows(options.out, "figures", machine)
    whole = figures.measure(table, "cuda", clock_of("cuda"), until)
    table.note(seconds=time.monotonic() - began)
    _add_estimates(table, options.out / "estimates.json")
    print(*figures.by_loss(table.rows), sep="\n", flush=True)
    failed = [row for row in table.rows if "failed" in row]
    return 1 if failed else 0 if whole else 3


if __name__ == "__main__":
    sys.exit(main())
