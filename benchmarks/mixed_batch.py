"""What a batch costs whose samples have adapters of their own, over the frozen layer.

    python -m benchmarks.mixed_batch  # 8 adapters, 8 samples of 128 tokens, 1024 x 1024, r = 16
    python -m benchmarks.mixed_batch --adapters 4 --samples 16 --rounds 40 --out runs/mixed.json

One PEFT layer in eval with several adapters is called with `adapter_names`: `frozen` (nn.Linear),
`peft` (its loop over sub-batches) and `dk` (the same layer, accelerated) in turn, forward alone and
forward with backward of everything that has an adapter. The samples: `sorted` by adapter,
`unsorted`, and `with base`, where every third has none.
"""

import random
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.overhead import interval, parser_of, write
from benchmarks.timing import Budget, clock_of, rounds

IMPLEMENTATIONS = ("frozen", "peft", "dk")


def layer_of(width: int, rank: int, adapters: int, device: str) -> Any:
    """Return a PEFT model of one linear with that many adapters, away from their start."""
    torch.manual_seed(0)
    config = peft.LoraConfig(r=rank, target_modules=["0"], init_lora_weights=False)
    made: Any = peft.get_peft_model(nn.Sequential(nn.Linear(width, width, bias=False)), config, "0")
    for i in range(1, adapters):
        made.add_adapter(str(i), config)
    made.eval().to(device)
    for name, parameter in made.named_parameters():
        parameter.requires_grad_("lora_" in name)
    return made.base_model.model[0]


def names_of(adapters: int, samples: int) -> dict[str, list[str]]:
    """Return what the samples are given: case → adapter names."""
    each = [str(i * adapters // samples) for i in range(samples)]
    mixed = random.Random(1).sample(each, samples)
    return {
        "sorted": each,
        "unsorted": mixed,
        "with base": ["__base__" if i % 3 == 0 else name for i, name in enumerate(mixed)],
    }


def passes(layers: dict[str, Any], x: Tensor, names: list[str], backward: bool) -> dict[str, Callable[[], Any]]:
    """Return the passes of one case: implementation → its pass."""
    dy = torch.randn_like(x)
    parameters = {name: list(layer.parameters()) for name, layer in layers.items()}

    def run(name: str) -> None:
        layer = layers[name]
        with torch.set_grad_enabled(backward):
            y = layer(x) if name == "frozen" else layer(x, adapter_names=names)
        if backward:
            y.backward(dy)
            x.grad = None
            for parameter in parameters[name]:
                parameter.grad = None

    return {name: lambda name=name: run(name) for name in IMPLEMENTATIONS}  # type: ignore[misc]


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record."""
    parser = parser_of(__doc__, rounds=40)
    for name, value in (("adapters", 8), ("samples", 8), ("tokens", 128), ("width", 1024), ("rank", 16)):
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    made = [layer_of(options.width, options.rank, options.adapters, options.device) for _ in range(2)]
    dk.accelerate(made[1], strict=True)
    layers = {"frozen": made[0].base_layer, "peft": made[0], "dk": made[1]}
    x = torch.randn(options.samples, options.tokens, options.width, device=options.device)
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=5)
    rows: list[dict[str, Any]] = []
    table = Table("samples", "pass", "frozen, ms", "peft / frozen", "dk / frozen")
    for backward in (False, True):
        x.requires_grad_(backward)
        for case, names in names_of(options.adapters, options.samples).items():
            run = passes(layers, x, names, backward)
            times = {
                name: [ms for ms, _ in spent] for name, spent in rounds(run, clock_of(options.device), budget).items()
            }
            row: dict[str, Any] = {"case": case, "pass": "forward, backward" if backward else "forward"}
            row |= {f"{name}_ms": statistics.median(spent) for name, spent in times.items()}
            for name in ("peft", "dk"):
                ratio = interval(lambda medians, name=name: medians[name] / medians["frozen"], times)  # type: ignore[misc]
                row |= {f"{name}_over_frozen": ratio[0], f"{name}_interval": ratio[1:]}
            rows.append(row)
            shown = (
                f"{row[f'{n}_over_frozen']:.2f} ({row[f'{n}_interval'][0]:.2f} to {row[f'{n}_interval'][1]:.2f})"
                for n in ("peft", "dk")
            )
            table.add_row(case, row["pass"], f"{row['frozen_ms']:.2f}", *shown)
    Console().print(table)
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
