"""ETHER and ETHER+ on this machine's CPU: ours, the authors' form, and the frozen linear.

    python -m benchmarks.ether [-T 1024] [-K 2048] [-N 2048] [-n 1] [--rounds 30] [--json FILE]

Medians of interleaved forward and backward passes in float32, dx included, and the bytes kept for backward. Before a
method is timed, ours and the authors' form must agree, in y and every gradient, where they compute the same (n = 1).
"""

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from benchmarks.ether_authors import ether_authors
from benchmarks.machine import machine_info
from benchmarks.memory import MIB, kept_bytes
from benchmarks.timing import Budget, CpuClock, interleaved
from delora_kernels import functional as F
from delora_kernels.testing import relative_error

METHODS = {
    "ether": ("u",),
    "ether-both": ("u", "u_out"),
    "ether-plus": ("u", "v"),
    "ether-plus-both": ("u", "v", "u_out", "v_out"),
}
"""Method → its vectors."""

AGREE = 1e-4
"""Two float32 results that round in other places: sums of thousands of terms, and gradients that lost their largest."""


def passes_of(method: str, options: Any) -> tuple[dict[str, Callable[[], Tensor]], dict[str, Tensor], Tensor]:
    """impl → forward pass, the tensors that get gradients, and the frozen weight."""
    T, K, N, n = (getattr(options, name) for name in "TKNn")
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(N, K, generator=generator) / K**0.5
    trained = {"x": torch.randn(T, K, generator=generator).requires_grad_()}
    for name in METHODS[method]:
        features = N if name.endswith("_out") else K
        trained[name] = torch.randn(n, features // n, generator=generator).requires_grad_()
    ours: Callable[..., Tensor] = F.ether_plus_linear if "v" in trained else F.ether_linear
    passes = {
        "frozen": lambda: linear(trained["x"], weight),
        "dk": lambda: ours(weight=weight, **trained),
        "authors": lambda: ether_authors(weight=weight, **trained),
    }
    return passes, trained, weight


def results(forward: Callable[[], Tensor], trained: dict[str, Tensor], dy: Tensor) -> list[Tensor]:
    """y and the gradients."""
    y = forward()
    return [y.detach(), *torch.autograd.grad(y, list(trained.values()), dy, allow_unused=True)]


def measured(method: str, options: Any) -> list[dict[str, Any]]:
    """One row for each implementation.

    Raises:
        AssertionError: ours and the authors' form disagree.
    """
    passes, trained, weight = passes_of(method, options)
    dy = torch.randn(options.T, options.N, generator=torch.Generator().manual_seed(1))
    if options.n == 1:
        pairs = zip(results(passes["dk"], trained, dy), results(passes["authors"], trained, dy), strict=True)
        assert max(relative_error(a, b) for a, b in pairs) <= AGREE
    timed = {impl: lambda f=forward: results(f, trained, dy) for impl, forward in passes.items()}
    times = interleaved(timed, CpuClock(), Budget(0, options.rounds, options.rounds))
    sizes = {name: getattr(options, name) for name in "TKNn"}
    rows = []
    for impl, spent in times.items():
        row = {"method": method, "impl": impl, **sizes, "median_ms": spent.median_ms, "p20_ms": spent.p20_ms}
        row |= {"p80_ms": spent.p80_ms, "ratio_to_frozen": spent.median_ms / times["frozen"].median_ms}
        row["authors_over_this"] = times["authors"].median_ms / spent.median_ms
        row["saved_mib"] = kept_bytes(passes[impl], [*trained.values(), weight]) / MIB
        rows.append(row)
    return rows


def main() -> None:
    """Measure every method, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, text in (
        ("T", 1024, "tokens"),
        ("K", 2048, "in-features"),
        ("N", 2048, "out-features"),
        ("n", 1, "blocks of each side"),
    ):
        parser.add_argument(f"-{name}", type=int, default=default, help=f"{text} [%(default)s]")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="what to measure [all]")
    parser.add_argument("--rounds", type=int, default=30, help="interleaved rounds [%(default)s]")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads(), help="of torch [%(default)s]")
    parser.add_argument("--json", type=Path, help="write the rows here")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    machine = machine_info("cpu")
    print(f"{machine['cpu']}, {options.threads} threads, torch {machine['torch']}, commit {machine['commit']}")
    print(" ".join(f"{name}={getattr(options, name)}" for name in "TKNn"), "float32, forward + backward")
    columns = ("median_ms", "p20_ms", "p80_ms", "ratio_to_frozen", "authors_over_this", "saved_mib")
    print(f"{'method':<16} {'impl':<8} {'ms':>8} {'p20':>8} {'p80':>8} {'/frozen':>8} {'authors/':>8} {'kept MiB':>8}")
    rows: list[dict[str, Any]] = []
    for method in options.methods:
        for row in measured(method, options):
            print(f"{row['method']:<16} {row['impl']:<8}" + "".join(f" {row[name]:8.2f}" for name in columns))
            rows.append(row)
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
