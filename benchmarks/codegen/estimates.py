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
from benchmarks.codegen.asked import cell, summary
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
    return [(layer, _estimate(layer, steps, made)) for layer, steps in recorded]


def _estimate(layer: Layer, steps: list[Any], made: dict[str, Any]) -> LayerEstimate:
    return layer_of(steps, made, layer.T, layer.K, layer.outputs, len(layer.siblings))


def contract(layer: Layer, form: str = "d") -> float:
    """Return what the traffic contract allows over the frozen products."""
    ceilings = model.Ceilings(device.COPY, device.GEMM)
    R = (layer.r + 1) * layer.E if layer.E else layer.r
    sizes = layer.T, layer.K, layer.N
    if layer.siblings:
        steps = model.siblings(layer.T, layer.K, (layer.N, *layer.siblings), layer.r, 2, form)
    else:
        steps = model.adapted(layer.method, *sizes, R, 2, True, form)
    return ceilings.seconds(steps) / ceilings.seconds(model.frozen(layer.T, layer.K, layer.outputs, 2, True))


def least(layer: Layer, estimate: LayerEstimate, form: str = "d") -> float:
    """Return what is left where each of the form's passes runs at a copy's rate and launches are
    free: the contract, and what GEMMs that add to their outputs (beta = 1) take longer.
    """
    adding = estimate.adding
    if form == "c":  # the rank terms are in the products: siblings' dx alone are added up
        adding = 1e6 * device.ADDING * layer.T * layer.K * len(layer.siblings)
    return contract(layer, form) + adding / estimate.frozen


def row_of(layer: Layer, estimate: LayerEstimate) -> dict[str, Any]:
    """Return the row of a record."""
    kernels = [
        {
            "kernel": kernel.kernel,
            "us": round(kernel.total, 1),
            "bytes_us": round(kernel.bytes, 1),
            "limit": kernel.limit,
        }
        for kernel in estimate.kernels
    ]
    return {
        "layer": layer.title, "T": layer.T, "K": layer.K, "N": layer.outputs, "ratio": round(estimate.ratio, 3),
        "contract": contract(layer), "least": least(layer, estimate), "least_own_gemm": least(layer, estimate, "c"),
        "over_layers": round(estimate.ratio_to_layers, 3), "us": round(estimate.total, 1),
        "frozen_us": round(estimate.frozen, 1), "summed_us": round(estimate.summed, 1),
        "adding_us": round(estimate.adding, 1), "others_us": round(estimate.others, 1), "kernels": kernels,
    }  # fmt: skip


def lines(rows: list[dict[str, Any]], kernels: bool) -> list[str]:
    """Return the table as Markdown; with each launch below its layer, on request.

    The contract is that of form (d). The least is what its passes take at a copy's rate, with what
    adding to an output costs a GEMM, and where our own GEMM, as fast as the library's, has the
    terms in its accumulator. Frozen siblings' dx are added up by autograd: a ratio with it behind.
    What is asked stands in asked.py.
    """
    shown = ["| layer | K | N | estimated µs | over frozen | asked | contract | least | least, own GEMM |"]
    shown.append("| --- |" + " ---: |" * 8)
    for row in rows:
        sizes = f"{row['K']} | {row['N']} | {row['us']:.0f}"
        ratio = f"{row['ratio']:.2f}" + (f" ({row['over_layers']:.2f})" if row["summed_us"] else "")
        rest = " | ".join(f"{row[name]:.2f}" for name in ("contract", "least", "least_own_gemm"))
        shown.append(f"| {row['layer']} | {sizes} | {ratio} | {cell(row, rows)} | {rest} |")
        if kernels:
            steps = ", ".join(f"{each['kernel']} {each['us']} ({each['limit']})" for each in row["kernels"])
            shown.append(f"    beta=1 {row['adding_us']}, torch's own {row['others_us']}, {steps}")
    return [*shown, "", *summary(rows)]


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
