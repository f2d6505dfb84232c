"""What decides between the forms of docs/kernels.md, on this GPU, before any layer is timed.

    python -m benchmarks.kernel_figures [--json FILE]

Our GEMM (with a rank-16 term) over the library's, x Wᵀ (NT) and dy W (NN): form (c) pays below
about 1.04. Adding to the output (beta = 1) over writing it: what form (d) pays in the GEMM. Each
skinny pass as a part of a copy's rate.
"""

import argparse
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ceilings import copy_tbps
from benchmarks.timing import Budget, Clock, clock_of, interleaved
from delora_kernels.backends.library_gemm import WrittenTerm
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.backends.triton.times_small import times_small
from delora_kernels.backends.triton.token_sums import token_sums

TOKENS, RANK = 8192, 16
LAYERS = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
"""(in-features, out-features)."""

Row = dict[str, Any]


class Skinny(NamedTuple):
    """A pass that computes little: one call, and how many times it reads or writes x, y and W."""

    run: Callable[[], Any]
    x: int = 0
    y: int = 0
    W: int = 0


def gemms(T: int, K: int, N: int, device: str) -> dict[str, Callable[[], Any]]:
    """Return the products of one layer, by the library and by our GEMM."""
    x, W, dy, h = (_normal(device, *shape) for shape in ((T, K), (N, K), (T, N), (T, RANK)))
    A, B, y = _normal(device, RANK, K), _normal(device, N, RANK), _normal(device, T, N)
    return {
        "library NT": lambda: linear(x, W),
        "own NT": lambda: rank_gemm(x, W.t(), h, B.t(), 1.0),
        "library NN": lambda: torch.mm(dy, W),
        "own NN": lambda: rank_gemm(dy, W, h, A, 1.0),
        "beta=0": lambda: torch.mm(x, W.t(), out=y),
        "beta=1": lambda: y.addmm_(x, W.t()),
    }


RATIOS = (("own NT", "library NT"), ("own NN", "library NN"), ("beta=1", "beta=0"))


def skinny_passes(T: int, K: int, N: int, device: str) -> dict[str, Skinny]:
    """Every pass that a layer makes beside its GEMMs."""
    x, W, y, h = (_normal(device, *shape) for shape in ((T, K), (N, K), (T, N), (T, RANK)))
    A, B, dx = _normal(device, RANK, K), _normal(device, N, RANK), torch.empty_like(x)
    return {
        "project": Skinny(lambda: times_small(x, A.t(), torch.bfloat16), x=1),
        "prefill of y": Skinny(lambda: rank_update(None, h, B.t(), 1.0, y), y=1),
        "update of y": Skinny(lambda: rank_update(y, h, B.t(), 1.0, y), y=2),
        "dv and dB": Skinny(lambda: dy_sums(y, B, h, 1.0, False, None), y=1),
        "dA": Skinny(lambda: token_sums(x, h, transposed=True), x=1),
        "dA and prefill of dx": Skinny(lambda: token_sums(x, h, transposed=True, term=WrittenTerm(A, dx)), x=2),
        "row norm": Skinny(lambda: row_norm(W, A, B, 1.0, None, False), W=1),
    }


def _normal(device: str, *shape: int) -> Tensor:
    return torch.randn(*shape, device=device).bfloat16()


def measured(device: str, clock: Clock, budget: Budget) -> list[Row]:
    """Rows {"K", "N", "figure", "ms", "ratio"}: a ratio of times, or of a skinny pass its part of a
    copy's rate.
    """
    rows: list[Row] = []
    copy = copy_tbps(device, clock)
    for K, N in LAYERS:
        times = interleaved(gemms(TOKENS, K, N, device), clock, budget)
        for ours, other in RATIOS:
            ratio = times[ours].median_ms / times[other].median_ms
            rows.append({"K": K, "N": N, "figure": f"{ours} / {other}", "ms": times[ours].median_ms, "ratio": ratio})
        passes = skinny_passes(TOKENS, K, N, device)
        times = interleaved({name: skinny.run for name, skinny in passes.items()}, clock, budget)
        for name, skinny in passes.items():
            moved = 2 * (skinny.x * TOKENS * K + skinny.y * TOKENS * N + skinny.W * N * K)
            ms = times[name].median_ms
            rows.append({"K": K, "N": N, "figure": name, "ms": ms, "ratio": moved / ms / 1e9 / copy})
    return rows


def table(rows: list[Row]) -> str:
    """Return a Markdown table: a line for each figure, a column for each layer."""
    layers = list(dict.fromkeys((row["K"], row["N"]) for row in rows))
    lines = ["| | " + " | ".join(f"{K} → {N}" for K, N in layers) + " |", "| --- |" + " ---: |" * len(layers)]
    for figure in dict.fromkeys(row["figure"] for row in rows):
        cells = [f"{row['ratio']:.2f} ({row['ms']:.3f} ms)" for row in rows if row["figure"] == figure]
        lines.append(f"| {figure} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(argv: list[str] | None = None, clock: Clock | None = None, budget: Budget | None = None) -> int:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="default: cuda")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args(argv)
    if options.device.startswith("cuda") and not torch.cuda.is_available():
        print("benchmarks.kernel_figures needs a CUDA device, and there is none", file=sys.stderr)
        return 2
    rows = measured(options.device, clock or clock_of(options.device), budget or Budget(1.0, 7, 50))
    print(f"bfloat16, T={TOKENS}, r={RANK}: our time over the other's; of a pass, its part of a copy's rate")
    print(table(rows))
    if options.json:
        options.json.write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
