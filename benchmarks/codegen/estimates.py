"""Estimates of whole layers from the binaries that they launch: `python -m benchmarks.model
--from-binaries`.

    --layer "dora r=16" --shape 4096 4096 --kernels     each launch of one layer, and what limits it
    --commit 7eec195                                    the same of another commit's kernels

An estimate is not a measurement: it says what to change, and a GPU says what came of it. Beside
each stands what the traffic contract allows in form (d) (benchmarks/model.py), at the same rates.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks import model
from benchmarks.codegen import device
from benchmarks.codegen.calls import Layer, estimated, steps_of
from benchmarks.codegen.compiling import compiled_all
from benchmarks.codegen.estimate import LayerEstimate, layer_of
from benchmarks.codegen.recording import Launch

HERE = Path(__file__).parent
REVIEWED = {"lora r=16": 1.22, "dora r=16": 1.55, "lora r=32": 1.42, "ether-plus-both": 1.60}
"""What a reading of commit 7eec195's disassembly by hand predicted at 4096², forward and backward.

For ether-plus-both it counted two programs a multiprocessor in `reflect`, whose 136 registers allow
one, and 3 µs for adding 256 parts on 8 programs: with these two the estimate here is 1.65.
"""


def estimates_of(layers: Iterable[Layer], workers: int | None = None) -> list[tuple[Layer, LayerEstimate]]:
    """Record every layer, compile what it launches, estimate it."""
    recorded = [(layer, steps_of(layer)) for layer in layers]
    made = compiled_all((step.binary for _, steps in recorded for step in steps if isinstance(step, Launch)), workers)
    return [(layer, layer_of(steps, made, layer.T, layer.K, layer.outputs)) for layer, steps in recorded]


def contract(layer: Layer) -> float | None:
    """Return what the traffic contract allows over the frozen linear; None: it has no figure."""
    if layer.siblings:
        return None
    ceilings = model.Ceilings(device.COPY, device.GEMM)
    R = (layer.r + 1) * layer.E if layer.E else layer.r
    sizes = layer.T, layer.K, layer.N
    ours = ceilings.seconds(model.adapted(layer.method, *sizes, R, 2, True, "d"))
    return ours / ceilings.seconds(model.frozen(*sizes, 2, True))


def row_of(layer: Layer, estimate: LayerEstimate) -> dict[str, Any]:
    """Return the row of a record."""
    kernels = [
        {"kernel": kernel.kernel, "us": round(kernel.total, 1), "limit": kernel.limit} for kernel in estimate.kernels
    ]
    return {
        "layer": layer.title, "T": layer.T, "K": layer.K, "N": layer.outputs, "ratio": round(estimate.ratio, 3),
        "contract": contract(layer), "us": round(estimate.total, 1), "frozen_us": round(estimate.frozen, 1),
        "adding_us": round(estimate.adding, 1), "kernels": kernels,
    }  # fmt: skip


def lines(rows: list[dict[str, Any]], kernels: bool) -> list[str]:
    """Return the table as Markdown; with each launch below its layer, on request."""
    shown = ["| layer | K | N | estimated µs | over frozen | contract, form (d) |", "| --- |" + " ---: |" * 5]
    for row in rows:
        allowed = "" if row["contract"] is None else f"{row['contract']:.2f}"
        sizes = f"{row['K']} | {row['N']} | {row['us']:.0f}"
        shown.append(f"| {row['layer']} | {sizes} | {row['ratio']:.2f} | {allowed} |")
        if kernels:
            steps = ", ".join(f"{each['kernel']} {each['us']} ({each['limit']})" for each in row["kernels"])
            shown.append(f"    beta=1 {row['adding_us']}, {steps}")
    return shown


def of_commit(commit: str, arguments: list[str]) -> int:
    """Run these very files on the kernels of another commit, in a work tree that goes again."""
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder, "tree")
        subprocess.run(["git", "-C", HERE, "worktree", "add", "--detach", "--quiet", tree, commit], check=True)
        try:
            (tree / "benchmarks/codegen.py").unlink(missing_ok=True)
            shutil.copytree(HERE, tree / "benchmarks/codegen", dirs_exist_ok=True)
            command = [sys.executable, "-m", "benchmarks.codegen.estimates", *arguments]
            return subprocess.run(command, cwd=tree, env={**os.environ, "PYTHONPATH": str(tree)}).returncode
        finally:
            subprocess.run(["git", "-C", HERE, "worktree", "remove", "--force", tree], check=True)


def main(argv: list[str] | None = None) -> int:
    """Estimate, print, write."""
    parser = argparse.ArgumentParser(prog="benchmarks.model --from-binaries", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    add = parser.add_argument
    add("--layer", action="append", help="words of its title, as in 'lora r=16'; default: all")
    add("--shape", type=int, nargs=2, action="append", metavar=("K", "N"), help="default: all four, and groups")
    add("--kernels", action="store_true", help="each launch, and what limits it")
    add("--commit", help="of the kernels; default: those that lie here")
    add("--reviewed", action="store_true", help="the four layers of REVIEWED, beside what it says")
    add("--workers", type=int, help="processes that compile; default: one for each core")
    add("--json", type=Path, help="write the rows here")
    arguments = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(arguments)
    if options.commit:
        at = arguments.index("--commit")
        return of_commit(options.commit, arguments[:at] + arguments[at + 2 :])
    wanted, shapes = options.layer, options.shape
    if options.reviewed:
        wanted, shapes = list(REVIEWED), [[4096, 4096]]
    layers = [
        layer
        for layer in estimated()
        if (not wanted or layer.title in wanted) and (not shapes or [layer.K, layer.outputs] in shapes)
    ]
    rows = [row_of(*found) for found in estimates_of(layers, options.workers)]
    print(*lines(rows, options.kernels), sep="\n")
    if options.reviewed:
        print(*(f"{row['layer']}: {row['ratio']:.2f}, by hand {REVIEWED[row['layer']]:.2f}" for row in rows), sep="\n")
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
