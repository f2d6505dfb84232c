"""What part of PEFT's overhead over the frozen model is gone, in small whole models.

    python -m benchmarks.overhead  # LoRA, DoRA, DeLoRA; two threads of a CPU, or a GPU
    python -m benchmarks.overhead --method lora --rounds 40 --out runs/overhead.json

A step is zero_grad, forward, backward and fused AdamW, on a Llama of SmolLM2's widths whose linears
all carry an adapter with a random B. Four models take their steps in turn: `frozen` (no adapters;
every dx that the others compute), `peft`, `addmm` (bare autograd Functions around addmm, layer by
layer: benchmarks/layer/addmm.py) and `dk`. Their layers share the frozen weights.

    gone = 1 − (ms − frozen) / (peft − frozen)

An interval holds 95 % of what the same rounds give when they are drawn anew (bootstrap): a figure
whose interval is wide says that the machine was busy, not what the code does.
"""

import argparse
import json
import random
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.layer.addmm import addmm
from benchmarks.layer.methods import METHODS
from benchmarks.machine import machine_info
from benchmarks.model_cases import SMALL, ModelCase
from benchmarks.timing import Budget, clock_of, rounds
from benchmarks.whole_model import adapted, twin

IMPLEMENTATIONS = ("frozen", "peft", "addmm", "dk")
RESAMPLES = 2000


class Step:
    """One training step of one implementation, which owns its model.

    Args:
        case: Sizes and method.
        base: PEFT's model; the frozen weights are shared with it.
        name: One of IMPLEMENTATIONS.
        device: Where.
    """

    def __init__(self, case: ModelCase, base: Any, name: str, device: str) -> None:
        self.model = twin(base)
        self.model.enable_input_require_grads()  # every layer's dx, in every implementation
        if name == "dk":
            dk.accelerate(self.model, strict=True)
        if name == "addmm":
            as_addmm(self.model, case.method)
        if name == "frozen":
            self.model.base_model.disable_adapter_layers()
        trained = [] if name == "frozen" else [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None
        generator = torch.Generator().manual_seed(1)
        shape = (case.batch, case.sequence)
        self.tokens = torch.randint(case.vocabulary, shape, generator=generator).to(device)

    def __call__(self) -> Tensor:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        loss: Tensor = self.model(input_ids=self.tokens, labels=self.tokens).loss
        loss.backward()
        if self.optimizer is not None:
            self.optimizer.step()
        return loss


def as_addmm(model: nn.Module, method: str) -> None:
    """Give every adapter layer of PEFT's the bare Function's forward, in place."""
    in_peft = METHODS[method].in_peft

    def forward(layer: Any, x: Tensor) -> Tensor:
        made = in_peft(layer) | {"x": x.flatten(0, -2), "weight": layer.base_layer.weight}
        if method != "delora":
            made["scale"] = layer.scaling["default"]
        return addmm(made).view(*x.shape[:-1], -1)

    for layer in model.modules():
        if hasattr(layer, "base_layer"):
            layer.forward = MethodType(forward, layer)


def gone(spent: Mapping[str, float], name: str) -> float:
    """Return the part of PEFT's overhead that `name` does not have."""
    return 1 - (spent[name] - spent["frozen"]) / (spent["peft"] - spent["frozen"])


def interval(
    figure: Callable[[dict[str, float]], float], times: Mapping[str, Sequence[float]], seed: int = 0
) -> tuple[float, float, float]:
    """Return a figure of the medians, and the interval that holds 95 % of it over rounds drawn
    anew.

    Args:
        figure: Of name → milliseconds.
        times: Name → milliseconds of every round; the rounds are drawn together.
        seed: Of the draws.
    """
    count, draw = min(map(len, times.values())), random.Random(seed)
    found = []
    for _ in range(RESAMPLES):
        chosen = draw.choices(range(count), k=count)
        found.append(figure({name: statistics.median(each[i] for i in chosen) for name, each in times.items()}))
    found.sort()
    whole = figure({name: statistics.median(each) for name, each in times.items()})
    return whole, found[int(0.025 * RESAMPLES)], found[int(0.975 * RESAMPLES) - 1]


def measure(case: ModelCase, device: str, budget: Budget) -> list[dict[str, Any]]:
    """Return a row for each implementation: ms, over the frozen model, the part of PEFT's overhead
    that is gone.
    """
    base = adapted(case, device, case.blocks)
    steps = {name: Step(case, base, name, device) for name in IMPLEMENTATIONS}
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(steps, clock_of(device), budget).items()}
    rows = []
    for name, spent in times.items():
        ratio = interval(lambda medians, name=name: medians[name] / medians["frozen"], times)  # type: ignore[misc]
        row = case.columns() | {"impl": name, "median_ms": statistics.median(spent), "rounds": len(spent)}
        row |= {"ratio_to_frozen": ratio[0], "ratio_interval": ratio[1:], "overhead_gone": None, "gone_interval": None}
        if name in ("addmm", "dk"):
            part = interval(lambda medians, name=name: gone(medians, name), times)  # type: ignore[misc]
            row |= {"overhead_gone": part[0], "gone_interval": part[1:]}
        rows.append(row)
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as people read them."""
    shown = Table("method", "model", "step, ms", "over frozen", "of PEFT's overhead gone")
    for row in rows:
        low, high = row["ratio_interval"]
        ratio = f"{row['ratio_to_frozen']:.3f} ({low:.3f} to {high:.3f})"
        part = "" if row["overhead_gone"] is None else f"{row['overhead_gone']:.0%}"
        if part:
            part += " ({:.0%} to {:.0%})".format(*row["gone_interval"])
        shown.add_row(row["method"], row["impl"], f"{row['median_ms']:.1f}", ratio, part)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "dora", "delora"), action="append", help="default: all three")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="of four steps; default: 20")
    parser.add_argument("--blocks", type=int, default=6, help="default: 6")
    parser.add_argument("--batch", type=int, default=2, help="default: 2")
    parser.add_argument("--sequence", type=int, default=256, help="default: 256")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU; default: 2")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = SMALL | {"blocks": options.blocks, "batch": options.batch, "sequence": options.sequence, "limit_mib": None}
    rows: list[dict[str, Any]] = []
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=3)
    for method in options.method or ("lora", "dora", "delora"):
        rows += measure(ModelCase(method, precision="fp32", **sizes), options.device, budget)
        Console().print(table(rows[-len(IMPLEMENTATIONS) :]))
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine_info(options.device), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
