"""What adapters cost on stored bases: PEFT's layer, the same one accelerated, the frozen base.

    python -m benchmarks.stored_bases  # LoRA, DoRA, DeLoRA on bitsandbytes' nf4, HQQ, torchao int8
    python -m benchmarks.stored_bases --form nf4 --method dora --out runs/stored.json
    python -m benchmarks.stored_bases --form nf4 --dtype bf16  # the base's compute dtype, and x's

A pass is forward and backward of one layer with float32 adapters, x needing its gradient; the three
take turns. Beside its time stand the bytes that it keeps for backward, x and parameters left out,
and its peak beyond what was there. PEFT
has no DeLoRA on stored bases: its own forward runs there after `allow_delora_on_stored_bases()`. A
form whose library is not installed is left out, with a line that says so.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.memory import MIB, allocations, kept_bytes
from benchmarks.overhead import gone, interval, parser_of, write
from benchmarks.timing import Budget, clock_of, rounds
from delora_kernels.diagnostics import stored_forms

IMPLEMENTATIONS = ("frozen", "peft", "dk")
SHAPES = ((512, 1024, 1024), (512, 576, 1536))
"""T, K, N."""


FORMS: dict[str, Callable[[nn.Linear, str], nn.Module]] = {
    "nf4": partial(stored_forms.bitsandbytes_4bit, nested=True),
    "hqq-4": stored_forms.hqq,
    "torchao-int8": stored_forms.torchao,
}
"""Name → (nn.Linear, device) → the same, stored, with its dtype to multiply in."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def layer(form: str, method: str, K: int, N: int, r: int, device: str, dtype: str) -> Any:
    """Return PEFT's layer of random weights and float32 factors."""
    torch.manual_seed(0)
    linear = nn.Linear(K, N, bias=False, device=device, dtype=DTYPES[dtype]).requires_grad_(False)
    base = FORMS[form](linear, device)
    model = nn.Sequential(base)
    model.is_loaded_in_4bit = form == "nf4"  # type: ignore[assignment]
    config: Any
    if method == "delora":
        dk.allow_delora_on_stored_bases()
        config = peft.DeloraConfig(r=r, target_modules=["0"], init_weights=False)
    else:
        config = peft.LoraConfig(r=r, target_modules=["0"], use_dora=method == "dora", init_lora_weights=False)
    return peft.get_peft_model(model, config).base_model.model[0]


def passes(form: str, method: str, shape: Sequence[int], r: int, device: str, dtype: str = "fp32") -> dict[str, Any]:
    """Return the modules of a case, x and the gradient that enters."""
    T, K, N = shape
    plain, fused = (layer(form, method, K, N, r, device, dtype) for _ in range(2))
    dk.accelerate(fused, strict=True)
    x, dy = (torch.randn(T, features, device=device, dtype=DTYPES[dtype]) for features in (K, N))
    x.requires_grad_()
    return {"modules": {"frozen": plain.base_layer, "peft": plain, "dk": fused}, "x": x, "dy": dy}


def step(module: nn.Module, x: Tensor, dy: Tensor) -> None:
    """Run forward and backward, and give the gradients back."""
    module(x).backward(dy)
    x.grad = None
    for parameter in module.parameters():
        parameter.grad = None


def measure(
    form: str, method: str, shape: Sequence[int], r: int, device: str, dtype: str, budget: Budget
) -> list[dict[str, Any]]:
    """Return a row for each implementation: ms, over the frozen base, over PEFT, MiB."""
    made = passes(form, method, shape, r, device, dtype)
    steps = {name: partial(step, module, made["x"], made["dy"]) for name, module in made["modules"].items()}
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(steps, clock_of(device), budget).items()}
    rows = []
    for name, module in made["modules"].items():
        row: dict[str, Any] = {"form": form, "method": method, "impl": name}
        row |= dict(zip("TKN", shape, strict=True)) | {"r": r, "dtype": dtype}
        row |= {"median_ms": statistics.median(times[name]), "rounds": len(times[name])}
        over_peft = interval(lambda medians, name=name: medians[name] / medians["peft"], times)  # type: ignore[misc]
        row |= {"ratio_to_frozen": row["median_ms"] / statistics.median(times["frozen"])}
        row |= {"ratio_to_peft": over_peft[0], "peft_interval": over_peft[1:]}
        medians = {each: statistics.median(spent) for each, spent in times.items()}
        row["overhead_gone"] = gone(medians, name) if name == "dk" else None
        kept = kept_bytes(lambda module=module: module(made["x"]), [made["x"], *module.parameters()])  # type: ignore[misc]
        row |= {"saved_mib": kept / MIB, "peak_mib": allocations(steps[name], device).peak / MIB}
        rows.append(row)
    of_peft = next(row["saved_mib"] for row in rows if row["impl"] == "peft")
    return [row | {"saved_to_peft": row["saved_mib"] / of_peft} for row in rows]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as people read them."""
    shown = Table(
        "form",
        "method",
        "dtype, T, K, N",
        "impl",
        "ms",
        "over frozen",
        "over PEFT",
        "kept, MiB",
        "of PEFT's",
        "peak, MiB",
    )
    for row in rows:
        low, high = row["peft_interval"]
        ratio = f"{row['ratio_to_peft']:.2f} ({low:.2f} to {high:.2f})"
        shape, name = f"{row['T']}, {row['K']}, {row['N']}", row["impl"]
        spent = (f"{row['median_ms']:.2f}", f"{row['ratio_to_frozen']:.2f}", ratio)
        memory = (f"{row['saved_mib']:.2f}", f"{row['saved_to_peft']:.2f}", f"{row['peak_mib']:.2f}")
        shown.add_row(row["form"], row["method"], f"{row['dtype']}, {shape}", name, *spent, *memory)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record; status 1 where no form is installed."""
    parser = parser_of(__doc__, rounds=30)
    parser.add_argument("--form", choices=FORMS, action="append", help="default: all that are installed")
    parser.add_argument("--shape", type=int, nargs=3, metavar=("T", "K", "N"), action="append", help="in place of all")
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="of x and of the base's GEMM; default: fp32")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=3)
    rows: list[dict[str, Any]] = []
    for form in options.form or FORMS:
        try:
            FORMS[form](nn.Linear(64, 64, bias=False).requires_grad_(False), options.device)
        except ImportError as error:
            print(f"{form}: left out, {error}")
            continue
        for method in options.method or ("lora", "dora", "delora"):
            for shape in options.shape or SHAPES:
                rows += measure(form, method, shape, options.rank, options.device, options.dtype, budget)
    if not rows:
        return 1
    Console().print(table(rows))
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
