"""What an adapted layer's overhead over the frozen one is made of on a CPU, operator by operator.

    python -m benchmarks.operators  # LoRA, DoRA, DeLoRA: one block of SmolLM2's widths, one thread
    python -m benchmarks.operators --method dora --rounds 100 --shapes 12

Whole steps (benchmarks/overhead.py) say how much of PEFT's overhead is gone, on a quiet machine.
This says where the rest is, and on a busy one too: each operator's own time is its least over all
rounds, place by place in the pass, so that only an interruption in every round counts.

A pass is forward and backward of one block's linears, those of one x together, and the time of an
operator is that inside torch (without what it calls in turn). Roles:

    products  with no dimension as small as the ranks: what the frozen layers do as well
    thin      products with one: h, the rank term, dv, dA, dB, DoRA's W + s·BA
    passes    other operators over tensors of a token's or a weight's size
    rest      on smaller tensors, views, and new memory
    between   no operator: Python, autograd, memory given back, and the profiler's own time

The last two lines say what part of PEFT's time beyond the frozen layers' is gone, `products` left
out, the same arithmetic in all of them; the first of the two leaves `between` out too. `arithmetic`
runs bare into memory that is there (benchmarks/arithmetic.py): what no implementation of torch
calls falls below. AdamW, the same in all, is left out.
"""

import gc
import math
import sys
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.arithmetic import Bare, siblings
from benchmarks.model_cases import SMALL, ModelCase
from benchmarks.overhead import ARITHMETIC, IMPLEMENTATIONS, Step, parser_of, random_tokens, write
from benchmarks.whole_model import adapted

ROLES = ("products", "thin", "passes", "rest", "between")
PRODUCTS = frozenset(("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"))
WARMUP = 4
MARK = "pass of "

Operator = tuple[str, tuple[tuple[int, ...], ...]]
"""Its name and the shapes of its tensors."""
BETWEEN: Operator = ("", ())
"""Stands for the time between two of them."""


def layers_pass(model: Any, case: ModelCase, tokens: torch.Tensor) -> Callable[[], None]:
    """Return forward and backward of all adapted linears of a model, without what is between."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups = []
    for layers in siblings(model, tokens):
        K = layers[0].base_layer.weight.shape[1]
        x = torch.randn(case.batch, case.sequence, K, requires_grad=True)
        dys = [torch.randn(case.batch, case.sequence, len(layer.base_layer.weight)) for layer in layers]
        groups.append((layers, x, dys))

    def run() -> None:
        for layers, x, dys in groups:
            torch.autograd.backward([layer(x) for layer in layers], dys)
            x.grad = None
        for parameter in trained:
            parameter.grad = None

    return run


def least(passes: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[tuple[Operator, float]]]:
    """Return the operators of each pass in their order, each with its own microseconds, the least
    of the rounds.

    Raises:
        RuntimeError: A pass calls other operators in one round than in another.
    """
    for run in passes.values():
        for _ in range(WARMUP):
            run()
    gc.collect()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        for _ in range(rounds):
            for name, run in passes.items():
                with record_function(MARK + name):
                    run()
    events = sorted(seen.events(), key=lambda event: (event.time_range.start, -event.time_range.end))
    found: dict[str, list[tuple[Operator, float]]] = {}
    for mark in [event for event in events if event.name.startswith(MARK)]:
        name, now = mark.name.removeprefix(MARK), _operators(mark, events)
        before = found.setdefault(name, now)
        if [operator for operator, _ in before] != [operator for operator, _ in now]:
            raise RuntimeError(f"{name} calls other operators in every round")
        found[name] = [(operator, min(a, b)) for (operator, a), (_, b) in zip(before, now, strict=True)]
    return found


def _operators(mark: Any, events: Sequence[Any]) -> list[tuple[Operator, float]]:
    """Return the operators of the pass that `mark` encloses, and the time before each that no other
    calls.
    """
    found: list[tuple[Operator, float]] = []
    last, end = mark.time_range.start, mark.time_range.end
    for event in events:
        if not (mark.time_range.start <= event.time_range.start < end and event.name.startswith("aten::")):
            continue
        if event.time_range.start >= last:
            found.append((BETWEEN, event.time_range.start - last))
            last = event.time_range.end
        shapes = tuple(tuple(shape) for shape in event.input_shapes if shape)
        found.append(((event.name, shapes), event.self_cpu_time_total))
    return [*found, (BETWEEN, end - last)]


def role_of(operator: Operator, small: int, large: int) -> str:
    """Return the role of an operator.

    Args:
        operator: Which.
        small: The largest dimension of ranks side by side.
        large: Elements of the smallest tensor of a token's or a weight's size.
    """
    if operator == BETWEEN:
        return "between"
    name, shapes = operator
    if name in PRODUCTS and shapes:
        return "thin" if min(min(shape) for shape in shapes if len(shape) > 1) <= small else "products"
    return "passes" if any(math.prod(shape) >= large for shape in shapes) else "rest"


def measure(case: ModelCase, rounds: int) -> list[dict[str, Any]]:
    """Return a row for each implementation and operator: calls, microseconds of them all, role."""
    base, tokens = adapted(case, "cpu", case.blocks), random_tokens(case, "cpu")
    passes = {name: layers_pass(Step(base, case.method, name, tokens).model, case, tokens) for name in IMPLEMENTATIONS}
    bare = Bare(base, case.method, tokens)
    widths = [len(layer.weight) for group in bare.groups for layer in group.layers]
    small, large = 3 * case.r, case.batch * case.sequence * min(widths)
    rows = []
    for name, operators in least(passes | {ARITHMETIC: bare.arithmetic}, rounds).items():
        calls, spent = Counter(operator for operator, _ in operators), Counter[Operator]()
        for operator, us in operators:
            spent[operator] += us  # type: ignore[assignment]  # floats
        rows += [
            case.columns()
            | {"impl": name, "operator": operator[0], "shapes": operator[1], "calls": calls[operator]}
            | {"us": us, "role": role_of(operator, small, large)}
            for operator, us in spent.items()
        ]
    return rows


def by_role(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """Return the microseconds of each implementation and role."""
    return {
        name: {role: sum(row["us"] for row in rows if (row["impl"], row["role"]) == (name, role)) for role in ROLES}
        for name in dict.fromkeys(row["impl"] for row in rows)
    }


def part_gone(spent: Mapping[str, Mapping[str, float]], name: str, *but: str) -> float:
    """Return what part of PEFT's time beyond the frozen layers' is gone, roles `but` left out."""
    own = {impl: sum(us for role, us in found.items() if role not in but) for impl, found in spent.items()}
    return 1 - (own[name] - own["frozen"]) / (own["peft"] - own["frozen"])


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return one method's rows as people read them, in milliseconds."""
    spent = by_role(rows)
    shown = Table(rows[0]["method"], *spent)
    for role in ROLES:
        shown.add_row(role, *(f"{found[role] / 1e3:.2f}" for found in spent.values()))
    calls = Counter[str]()
    for row in rows:
        calls[row["impl"]] += row["calls"] if row["role"] != "between" else 0
    shown.add_row("operators", *(str(calls[name]) for name in spent))
    for title, but in (("gone, of operators", ("products", "between")), ("gone, of all", ("products",))):
        gone = ("" if name in ("frozen", "peft") else f"{part_gone(spent, name, *but):.0%}" for name in spent)
        shown.add_row(title, *gone)
    return shown


def shapes_table(rows: Sequence[Mapping[str, Any]], most: int) -> Table:
    """Return the operators of `dk` that take longest, `products` left out."""
    shown = Table("operator", "shapes", "calls", "µs together")
    own = [row for row in rows if row["impl"] == "dk" and row["role"] not in ("products", "between")]
    for row in sorted(own, key=lambda row: -row["us"])[:most]:
        shapes = " ".join("×".join(map(str, shape)) for shape in row["shapes"])
        shown.add_row(row["operator"].removeprefix("aten::"), shapes, str(row["calls"]), f"{row['us']:.0f}")
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table for each method, write the record."""
    parser = parser_of(__doc__, rounds=40)
    parser.add_argument("--shapes", type=int, default=0, metavar="COUNT", help="list the longest operators of dk too")
    parser.set_defaults(threads=1, device="cpu")
    parser.add_argument("--batch", type=int, default=2, help="default: 2")
    parser.add_argument("--sequence", type=int, default=256, help="default: 256")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    case = ModelCase("lora", precision="fp32", **SMALL)
    case = replace(case, blocks=1, batch=options.batch, sequence=options.sequence, limit_mib=None)
    rows: list[dict[str, Any]] = []
    for method in options.method or ("lora", "dora", "delora"):
        found = measure(replace(case, method=method), options.rounds)
        Console().print(table(found))
        if options.shapes:
            Console().print(shapes_table(found, options.shapes))
        rows += found
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
