"""What part of PEFT's overhead over the frozen model is gone, in small whole models.

    python -m benchmarks.overhead  # LoRA, DoRA, DeLoRA; two threads of a CPU, or a GPU
    python -m benchmarks.overhead --method lora --rounds 40 --out runs/overhead.json

A step is zero_grad, forward, backward and fused AdamW, on a Llama of SmolLM2's widths whose linears
all carry an adapter with a random B. Four models take their steps in turn: `frozen` (no adapters;
every dx that the others compute), `peft`, `addmm` (bare autograd Functions around addmm, layer by
layer: benchmarks/layer/addmm.py) and `dk`. Their layers share the frozen weights.

    gone = 1 − (ms − frozen) / (peft − frozen)

The row `arithmetic` says how much can be gone: the frozen model's time and that of the method's own
products, sums and AdamW, run bare on the same shapes (benchmarks/arithmetic.py).

`host` is what one adapted linear takes of a step of a model so small that all of it is host time,
its share of the rest of the model and of AdamW counted in: the part that no faster product takes
away.

An interval holds 95 % of what the same rounds give when they are drawn anew (bootstrap): a figure
whose interval is wide says that the machine was busy, not what the code does.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.arithmetic import Bare
from benchmarks.layer.addmm import addmm
from benchmarks.layer.methods import METHODS
from benchmarks.machine import machine_info
from benchmarks.model_cases import SMALL, ModelCase
from benchmarks.timing import Budget, clock_of, rounds
from benchmarks.whole_model import adapted, twin
from delora_kernels.diagnostics.overhead import gone, interval

IMPLEMENTATIONS = ("frozen", "peft", "addmm", "dk")
ARITHMETIC = "arithmetic"
"""Names the row of what no implementation can leave out.
"""
TINY = {"hidden": 36, "intermediate": 48, "vocabulary": 32, "blocks": 2, "batch": 1, "sequence": 4, "r": 4}
"""Sizes of a model whose products take no time."""
HOST_ROUNDS = 5
"""Rounds of a tiny model for each one of the model that is measured."""


class Step:
    """One training step of one implementation, which owns its model.

    Args:
        base: PEFT's model, for `frozen` one without adapters too; the frozen weights are shared
            with it.
        method: Of its adapters.
        name: One of IMPLEMENTATIONS.
        tokens: What a step sees, int64 `[sequences, tokens]`; may be set anew between steps.
        around: Makes the context of a forward pass, such as autocast.
        strict: Whether ours must take every adapter layer.
    """

    def __init__(
        self,
        base: Any,
        method: str,
        name: str,
        tokens: Tensor,
        around: Callable[[], AbstractContextManager[Any]] = nullcontext,
        strict: bool = True,
    ) -> None:
        self.model, self.tokens, self.around = twin(base), tokens, around
        self.model.enable_input_require_grads()  # every layer's dx, in every implementation
        if name == "dk":
            dk.accelerate(self.model, strict=strict)
        if name == "addmm":
            as_addmm(self.model, method)
        if name == "frozen" and hasattr(self.model.base_model, "disable_adapter_layers"):
            self.model.base_model.disable_adapter_layers()
        trained = [] if name == "frozen" else [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=True) if trained else None

    def __call__(self) -> Tensor:
        if self.optimizer is not None:
            self.optimizer.zero_grad(set_to_none=True)
        with self.around():
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


def random_tokens(case: ModelCase, device: str) -> Tensor:
    """Return the tokens of a step, the same at every call."""
    generator = torch.Generator().manual_seed(1)
    return torch.randint(case.vocabulary, (case.batch, case.sequence), generator=generator).to(device)


def compared(times: Mapping[str, Sequence[float]], name: str, peft: str | None = None) -> dict[str, Any]:
    """Return what the times of interleaved rounds say of one implementation, with intervals.

    Args:
        times: Name → milliseconds of every round, "frozen" among them.
        name: Which one.
        peft: The implementation whose overhead it is to take away; None: not asked.
    """
    times = {each: times[each] for each in {"frozen", name, peft or name}}
    ratio = interval(lambda medians: medians[name] / medians["frozen"], times)
    found: dict[str, Any] = {"median_ms": statistics.median(times[name]), "rounds": len(times[name])}
    found |= {"ratio_to_frozen": ratio[0], "ratio_interval": ratio[1:], "overhead_gone": None, "gone_interval": None}
    if peft is not None:
        part = interval(lambda medians: gone(medians, name, peft), times)
        found |= {"overhead_gone": part[0], "gone_interval": part[1:]}
    return found


def speed_in_words(ratio: float, low: float, high: float) -> str:
    """Say how many times as fast something is, with the interval; too noisy where that holds 1."""
    if low <= 1.0 <= high:
        return f"too noisy: {low:.2f}x to {high:.2f}x"
    if ratio >= 1.0:
        return f"{ratio:.2f}x faster ({low:.2f} to {high:.2f})"
    return f"{1.0 / ratio:.2f}x slower ({1.0 / high:.2f} to {1.0 / low:.2f})"


def measure(case: ModelCase, device: str, budget: Budget) -> list[dict[str, Any]]:
    """Return a row for each implementation and for the arithmetic: ms, over the frozen model, the
    part of PEFT's overhead that is gone.
    """
    base, tokens = adapted(case, device, case.blocks), random_tokens(case, device)
    bare = Bare(base, case.method, tokens)
    steps = {name: Step(base, case.method, name, tokens) for name in IMPLEMENTATIONS}
    passes = steps | {"products": bare.products, ARITHMETIC: bare.step}
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(passes, clock_of(device), budget).items()}
    each_round = zip(times["frozen"], times[ARITHMETIC], times.pop("products"), strict=True)
    times[ARITHMETIC] = [frozen + whole - products for frozen, whole, products in each_round]
    rivals, host = dict.fromkeys(("addmm", "dk", ARITHMETIC), "peft"), host_us(case, device, budget)
    return [
        case.columns() | {"impl": name, "host_us": host.get(name)} | compared(times, name, rivals.get(name))
        for name in times
    ]


def host_us(case: ModelCase, device: str, budget: Budget) -> dict[str, float]:
    """Return the microseconds of a step of each implementation by adapted linear, of a model so
    small that all of it is host time.

    Args:
        case: Names the method and all that is not a size.
        device: Where.
        budget: Of the model that is measured; a tiny one takes more rounds.
    """
    tiny = replace(case, **TINY)  # type: ignore[arg-type]  # sizes, all of them
    base, tokens = adapted(tiny, device, tiny.blocks), random_tokens(tiny, device)
    steps = {name: Step(base, case.method, name, tokens) for name in IMPLEMENTATIONS}
    budget = replace(budget, least=HOST_ROUNDS * budget.least, most=HOST_ROUNDS * budget.most, warmup=5)
    linears = sum(hasattr(module, "base_layer") for module in base.modules())
    spent = rounds(steps, clock_of(device), budget)
    return {
        name: 1e3 * statistics.median(ms if host is None else host for ms, host in found) / linears
        for name, found in spent.items()
    }


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as people read them."""
    shown = Table("method", "model", "step, ms", "over frozen", "of PEFT's overhead gone", "host, µs")
    for row in rows:
        low, high = row["ratio_interval"]
        ratio = f"{row['ratio_to_frozen']:.3f} ({low:.3f} to {high:.3f})"
        part = "" if row["overhead_gone"] is None else f"{row['overhead_gone']:.0%}"
        if part:
            part += " ({:.0%} to {:.0%})".format(*row["gone_interval"])
        host = "" if row["host_us"] is None else f"{row['host_us']:.0f}"
        shown.add_row(row["method"], row["impl"], f"{row['median_ms']:.1f}", ratio, part, host)
    return shown


def parser_of(description: str | None, rounds: int) -> argparse.ArgumentParser:
    """Return the parser of a command that times IMPLEMENTATIONS in turn, in `rounds` rounds."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", choices=("lora", "dora", "delora"), action="append", help="default: all three")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=rounds, help=f"default: {rounds}")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU; default: 2")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    return parser


def write(
    rows: Sequence[Mapping[str, Any]], options: argparse.Namespace, machine: Mapping[str, Any] | None = None
) -> None:
    """Write the record of such a command where `--out` says; `machine`: as it was described when
    the first rows were measured (a record in the source tree makes its commit a dirty one).
    """
    if options.out is not None:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        record = {"machine": machine or machine_info(options.device), "rows": rows}
        options.out.write_text(json.dumps(record, indent=1), encoding="utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print the table, write the record."""
    parser = parser_of(__doc__, rounds=20)
    parser.add_argument("--blocks", type=int, default=6, help="default: 6")
    parser.add_argument("--batch", type=int, default=2, help="default: 2")
    parser.add_argument("--sequence", type=int, default=256, help="default: 256")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    sizes = SMALL | {"blocks": options.blocks, "batch": options.batch, "sequence": options.sequence, "limit_mib": None}
    rows: list[dict[str, Any]] = []
    budget = Budget(seconds=0, least=options.rounds, most=options.rounds, warmup=3)
    for method in options.method or ("lora", "dora", "delora"):
        rows += measure(ModelCase(method, precision="fp32", **sizes), options.device, budget)
        Console().print(table(rows[-len(IMPLEMENTATIONS) - 1 :]))
    write(rows, options)
    return 0


if __name__ == "__main__":
    sys.exit(main())
