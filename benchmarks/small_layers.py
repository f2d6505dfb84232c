"""Whether a small accelerated layer costs more than a bare autograd Function around addmm.

    python -m benchmarks.small_layers  # LoRA, DoRA, DeLoRA; two threads of a CPU, or a GPU
    python -m benchmarks.small_layers --method lora --rounds 100 --out runs/small_layers.json

Below a few hundred tokens a layer's time is what the host takes from one product to the next. A
pass is forward and backward of one layer in fp32, x needing its gradient: `frozen` (nn.Linear),
`peft`, `addmm` (benchmarks/layer/addmm.py) and `dk` (PEFT's layer, accelerated) in turn, on the
same tensors. The first row of a method is a layer so small that all of it is host time. The last
line is the geometric mean of dk over addmm over the other rows. Beside times, which hang on the
machine, stands how often a pass calls torch (its operators, views included, but not what those call
themselves).
"""

import math
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import delora_kernels as dk
from benchmarks.cases import Case
from benchmarks.layer.addmm import addmm
from benchmarks.layer.methods import inputs, peft_layer
from benchmarks.overhead import IMPLEMENTATIONS, interval, parser_of, write
from benchmarks.timing import Budget, clock_of, rounds

SMALLEST = (8, 16, 16)
SHAPES = tuple(
    (T, K, N) for T in (32, 128, 512) for K, N in ((192, 192), (576, 192), (576, 576), (576, 1536), (1536, 576))
)
"""T, K, N: a few tokens to a short sequence, at the widths of models of 100 million parameters.
"""


def passes(case: Case, device: str) -> dict[str, Callable[[], None]]:
    """Return the passes of one case: name → forward, backward, gradients given back."""
    made = inputs(case, device, seed=0)
    dy = made.pop("grad_out")
    plain, fused = peft_layer(case, made), peft_layer(case, made)
    dk.accelerate(fused, strict=True)
    x = made["x"].requires_grad_()
    given = {
        name: value.requires_grad_() if name in ("A", "B", "magnitude", "lam") else value
        for name, value in made.items()
    }
    forwards: dict[str, Callable[[], Tensor]] = {
        "frozen": lambda: torch.nn.functional.linear(x, made["weight"]),
        "peft": lambda: plain(x),
        "addmm": lambda: addmm(given),
        "dk": lambda: fused(x),
    }
    trained = [x, *given.values(), *plain.parameters(), *fused.parameters()]
    leaves = [each for each in trained if isinstance(each, Tensor) and each.requires_grad]

    def step(forward: Callable[[], Tensor]) -> None:
        forward().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    return {name: lambda forward=forward: step(forward) for name, forward in forwards.items()}  # type: ignore[misc]


def calls_of_torch(run: Callable[[], None]) -> int:
    """Return how many operators of torch a pass calls, not counting what those call themselves."""
    run()
    with profile(activities=[ProfilerActivity.CPU], acc_events=True) as seen:
        run()
    events = [event for event in seen.events() if event.name.startswith("aten::")]
    return sum(event.cpu_parent is None or not event.cpu_parent.name.startswith("aten::") for event in events)


def measure(case: Case, device: str, budget: Budget) -> list[dict[str, Any]]:
    """Return a row for each implementation: µs, over the frozen layer, over addmm with its
    interval.
    """
    made = passes(case, device)
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(made, clock_of(device), budget).items()}
    rows = []
    for name, spent in times.items():
        over_addmm = interval(lambda medians, name=name: medians[name] / medians["addmm"], times)  # type: ignore[misc]
        row: dict[str, Any] = {"method": case.method, "impl": name, "T": case.T, "K": case.K, "N": case.N, "r": case.r}
        row |= {"dtype": case.precision, "median_ms": statistics.median(spent), "rounds": len(spent)}
        row["calls_of_torch"] = calls_of_torch(made[name])
        row["ratio_to_frozen"] = row["median_ms"] / statistics.median(times["frozen"])
        rows.append(row | {"ratio_to_addmm": over_addmm[0], "addmm_interval": over_addmm[1:]})
    return rows


def geometric_mean(rows: Sequence[Mapping[str, Any]], name: str = "dk") -> float:
    """Return the geometric mean over shapes of an implementation's time over addmm's."""
    logs = [
        math.log(row["ratio_to_addmm"])
        for row in rows
        if row["impl"] == name and (row["T"], row["K"], row["N"]) != SMALLEST
    ]
    return math.exp(statistics.fmean(logs))


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows of one method as people read them."""
    shown = Table("T", "K", "N", *(f"{name}, µs" for name in IMPLEMENTATIONS), "peft / addmm", "dk / addmm")
    shapes = dict.fromkeys((row["T"], row["K"], row["N"]) for row in rows)
    for shape in shapes:
        found = {row["impl"]: row for row in rows if (row["T"], row["K"], row["N"]) == shape}
        low, high = found["dk"]["addmm_interval"]
        ours = f"{found['dk']['ratio_to_addmm']:.2f} ({low:.2f} to {high:.2f})"
        spent = (f"{1e3 * found[name]['median_ms']:.0f}" for name in IMPLEMENTATIONS)
        shown.add_row(*map(str, shape), *spent, f"{found['peft']['ratio_to_addmm']:.2f}", ours)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each method, write the record."""
    parser = parser_of(__doc__, rounds=60)
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "K", "N"), action="append", help="in place of all")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=5)
    rows: list[dict[str, Any]] = []
    for method in options.method or ("lora", "dora", "delora"):
        found: list[dict[str, Any]] = []
        for T, K, N in (SMALLEST, *(options.shape or SHAPES)):
            r = 16 if (T, K, N) != SMALLEST else 4
            found += measure(
                Case(method, shape=f"{K}x{N}", T=T, K=K, N=N, r=r, precision="fp32"), options.device, budget
            )
        Console().print(table(found))
        ours, theirs = geometric_mean(found), geometric_mean(found, "peft")
        print(f"{method}: geometric mean of dk over addmm {ours:.3f}, of peft {theirs:.3f}")
        calls = ", ".join(f"{row['impl']} {row['calls_of_torch']}" for row in found[-len(IMPLEMENTATIONS) :])
        print(f"{method}: calls of torch in a pass: {calls}")
        rows += found
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
