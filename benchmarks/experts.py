"""What adapters on the experts of a model cost: a block of Qwen3-MoE's experts, forward and
backward.

    python -m benchmarks.experts  # E=32, top-4, T=512 to 8192; two threads of a CPU, or a GPU
    python -m benchmarks.experts --tokens 512 16384 --experts 8 128 --top-k 1 8 --rank 4 64
    python -m benchmarks.experts --quick  # small blocks, even and skewed, in less than a minute
    python -m benchmarks.experts --table  # T=512 to 8192, even and skewed, E=32 to 128, in minutes

In turn, on the same tensors, both projections adapted with LoRA: `frozen` (the experts alone, by
Transformers' grouped GEMM), `peft` (the same with PEFT's wrappers), `peft-eager` (with the eager
loop), `loop` (W and the low-rank term of each expert that has tokens, in plain torch), `dk`
(accelerated). x and the routing weights need their gradients. Besides times: what is allocated in a
pass, and kept between forward and backward, the model's own parameters left out. A table for each
number of tokens and choice of sizes. With --skewed one expert has half of the tokens and every
second one has none. --table leaves `peft-eager` and `loop` to 512 tokens and 32 experts, for they
take seconds a pass. --summary prints ratios alone, a line for each case.

With --out the record is written after each case, whose seconds are printed. --resume takes what it
holds of this machine and commit, and measures the rest.
"""

import argparse
import copy
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import Qwen3MoeConfig
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import delora_kernels as dk
from benchmarks.machine import machine_info
from benchmarks.memory import allocations, kept_bytes
from benchmarks.overhead import write
from benchmarks.timing import Budget, clock_of, rounds
from delora_kernels.diagnostics.overhead import interval

IMPLEMENTATIONS = ("frozen", "peft", "peft-eager", "loop", "dk")
MIB = 2**20


@dataclass(frozen=True)
class ExpertsCase:
    """One block.

    Args:
        T: Tokens.
        E, top_k: Experts, and experts of a token.
        H, inner: Hidden size, and the experts' own.
        r: Rank of both adapters.
        dtype: Of everything.
        skewed: Whether one expert has half of the choices and every second one none.
    """

    T: int
    E: int = 32
    top_k: int = 4
    H: int = 1024
    inner: int = 384
    r: int = 8
    dtype: torch.dtype = torch.float32
    skewed: bool = False


class _Block(nn.Module):
    def __init__(self, experts: nn.Module) -> None:
        super().__init__()
        self.experts = experts

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y: Tensor = self.experts(x, chosen, weights)
        return y


class _Loop(nn.Module):
    """The experts that have tokens, one after the other, each with W x + s · B A x, by autograd."""

    def __init__(self, adapted: Any) -> None:
        super().__init__()
        self.adapted = adapted
        outer = adapted.base_model.model.experts
        wrappers = {each.parameter_name: each for each in (outer, outer.base_layer)}
        self.up, self.down = (self._projection(wrappers[name]) for name in ("gate_up_proj", "down_proj"))
        self.act = outer.get_base_layer().act_fn

    @staticmethod
    def _projection(wrapper: Any) -> Callable[[int], tuple[Tensor, Tensor, Tensor, float]]:
        """Expert → its W, A, B as PEFT packs them, and s."""
        W, scale = wrapper.get_param(), wrapper.scaling["default"]
        A, B = wrapper.lora_A["default"].weight, wrapper.lora_B["default"].weight
        E = W.shape[0]
        return lambda e: (W[e], A.view(E, -1, A.shape[1])[e], B.view(B.shape[0], -1, E)[:, :, e], scale)

    def forward(self, x: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        y = torch.zeros_like(x)
        for e in chosen.unique().tolist():
            token, choice = (chosen == e).nonzero(as_tuple=True)
            gate, up = self._linear(x[token], *self.up(e)).chunk(2, dim=-1)
            z = self._linear(self.act(gate) * up, *self.down(e))
            y.index_add_(0, token, z * weights[token, choice, None])
        return y

    @staticmethod
    def _linear(x: Tensor, W: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
        linear = nn.functional.linear
        return linear(x, W) + scale * linear(linear(x, A), B)


def routing(case: ExpertsCase, generator: torch.Generator) -> Tensor:
    """Draw the experts [T, k] of every token, different ones."""
    scores = torch.rand(case.T, case.E, generator=generator)
    if case.skewed:
        scores[:, 1::2] -= 2.0
        scores[: (case.T * case.top_k + 1) // 2, 0] += 4.0
    return scores.topk(case.top_k, dim=1).indices


def blocks(case: ExpertsCase, device: str) -> dict[str, Any]:
    """Make the block of every implementation, all with the same weights and factors."""
    config = Qwen3MoeConfig(
        hidden_size=case.H, moe_intermediate_size=case.inner, num_experts=case.E, num_experts_per_tok=case.top_k
    )
    config._experts_implementation_internal = "grouped_mm"
    generator = torch.Generator().manual_seed(0)
    with torch.device(device):
        experts = Qwen3MoeExperts(config).to(case.dtype)
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * parameter.shape[-1] ** -0.5)
    experts.requires_grad_(False)
    targets = ["experts.gate_up_proj", "experts.down_proj"]
    settings = peft.LoraConfig(
        r=case.r, lora_alpha=2 * case.r, target_modules=[], target_parameters=targets, init_lora_weights=False
    )
    made: dict[str, Any] = {"frozen": _Block(experts)}
    shared = {id(parameter): parameter for parameter in experts.parameters()}
    adapted = peft.get_peft_model(_Block(copy.deepcopy(experts, dict(shared))), settings, autocast_adapter_dtype=False)
    shared |= {id(parameter): parameter for parameter in adapted.parameters()}
    for name in IMPLEMENTATIONS[1:]:
        made[name] = copy.deepcopy(adapted, dict(shared))
    made["loop"] = _Loop(made["loop"])
    eager = made["peft-eager"].base_model.model.experts.get_base_layer()
    eager.config = copy.copy(eager.config)
    eager.config._experts_implementation_internal = "eager"
    dk.accelerate(made["dk"], strict=True)
    return made


def passes(case: ExpertsCase, device: str) -> tuple[dict[str, Callable[[], Tensor]], list[Tensor]]:
    """Return the forward pass of every implementation, and the tensors they get gradients of."""
    made, generator = blocks(case, device), torch.Generator().manual_seed(1)
    chosen = routing(case, generator).to(device)
    x = torch.randn(case.T, case.H, generator=generator).to(device, case.dtype).requires_grad_()
    weights = torch.rand(case.T, case.top_k, generator=generator).to(device, case.dtype).requires_grad_()
    leaves = [x, weights, *(p for p in made["dk"].parameters() if p.requires_grad)]
    return {name: partial(model, x, chosen, weights) for name, model in made.items()}, leaves


def measure(
    case: ExpertsCase, device: str, budget: Budget, names: Sequence[str] = IMPLEMENTATIONS
) -> list[dict[str, Any]]:
    """Return a row for each implementation that is named, `frozen` among them."""
    forwards, leaves = passes(case, device)
    forwards = {name: forwards[name] for name in names}
    dy = torch.ones(case.T, case.H, device=device, dtype=case.dtype)

    def step(forward: Callable[[], Tensor]) -> None:
        forward().backward(dy)
        for leaf in leaves:
            leaf.grad = None

    steps = {name: partial(step, forward) for name, forward in forwards.items()}
    times = {name: [ms for ms, _ in spent] for name, spent in rounds(steps, clock_of(device), budget).items()}
    held = [*leaves, *(p for model in blocks_of(forwards) for p in model.parameters())]
    rows = []
    for name, spent in times.items():
        ratio = interval(partial(_over_frozen, name), times)
        weighed = allocations(steps[name], device)
        row: dict[str, Any] = {"method": "experts", "impl": name, "mode": "forward+backward", **columns(case)}
        row |= {"median_ms": statistics.median(spent)}
        row |= {"ratio_to_frozen": ratio[0], "interval": ratio[1:], "rounds": len(spent)}
        row |= {"allocated_mib": weighed.total / MIB, "peak_mib": weighed.peak / MIB}
        rows.append(row | {"saved_mib": kept_bytes(forwards[name], held) / MIB})
    return rows


def columns(case: ExpertsCase) -> dict[str, Any]:
    """Return the record's columns that say what was measured."""
    sizes = {"T": case.T, "E": case.E, "top_k": case.top_k, "K": case.H, "N": case.inner, "r": case.r}
    return sizes | {"skewed": case.skewed, "dtype": str(case.dtype).removeprefix("torch.")}


def record_of(out: Path, device: str, resumed: bool) -> dict[str, Any]:
    """Return the record to go on with: its machine, and the rows of an earlier run if `resumed`.

    Raises:
        ValueError: that was on another machine, or at another commit.
    """
    here: dict[str, Any] = {"machine": machine_info(device), "rows": []}
    if not (resumed and out.exists()):
        return here
    record: dict[str, Any] = json.loads(out.read_text(encoding="utf-8"))
    before, now = (_what_must_agree(each["machine"]) for each in (record, here))
    other = sorted(name for name in now if before.get(name) != now[name])
    if other:
        raise ValueError(f"{out} was measured with another {', '.join(other)}: name another file")
    return record


def _what_must_agree(machine: Mapping[str, Any]) -> dict[str, Any]:
    clean = str(machine.get("commit")).removesuffix("-dirty")  # the record may lie in the source tree
    return {name: value for name, value in machine.items() if name != "clocks"} | {"commit": clean}


def of_case(rows: Sequence[dict[str, Any]], case: ExpertsCase, names: Sequence[str]) -> list[dict[str, Any]]:
    """Return a case's rows, where there is one for each implementation that is named; else none."""
    found = {row["impl"]: row for row in rows if columns(case).items() <= row.items()}
    return [found[name] for name in names] if found.keys() >= set(names) else []


def _over_frozen(name: str, medians: Mapping[str, Any]) -> Any:
    return medians[name] / medians["frozen"]


def blocks_of(forwards: Mapping[str, Any]) -> list[nn.Module]:
    """Return the models that the passes run."""
    return [forward.func for forward in forwards.values()]


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return rows as people read them."""
    shown = Table("T", "E", "top-k", "r", "skewed", "", "ms", "over frozen", "allocated, MiB", "kept, MiB", "peak, MiB")
    for row in rows:
        low, high = row["interval"]
        words = [f"{row['ratio_to_frozen']:.2f} ({low:.2f} to {high:.2f})"]
        words += [f"{row[name]:.1f}" for name in ("allocated_mib", "saved_mib", "peak_mib")]
        sizes = [str(row[name]) for name in ("T", "E", "top_k", "r")] + ["yes" if row["skewed"] else ""]
        shown.add_row(*sizes, str(row["impl"]), f"{row['median_ms']:.1f}", *words)
    return shown


QUICK = (
    ExpertsCase(T=256, E=8, top_k=2, H=256, inner=128),
    ExpertsCase(T=256, E=64, top_k=4, H=256, inner=128),
    ExpertsCase(T=1024, E=64, top_k=4, H=256, inner=128, r=16),
    ExpertsCase(T=256, E=64, top_k=4, H=256, inner=128, skewed=True),
)


TABLE = (
    *(ExpertsCase(T=T, skewed=skewed) for T in (512, 2048, 8192) for skewed in (False, True)),
    *(ExpertsCase(T=T, E=E) for E in (64, 128) for T in (512, 2048)),
)
FEW, SECONDS = 512, 25.0
"""Tokens up to which --table runs every implementation of 32 experts; after so long no further
round of a case begins.
"""


def of_table(case: ExpertsCase) -> tuple[str, ...]:
    """Return what --table runs of a case."""
    return IMPLEMENTATIONS if case.T <= FEW and case.E <= 32 else ("frozen", "peft", "dk")


def summary(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return a line for each case: what each implementation's step takes of the frozen experts'."""
    shown = Table(
        "T", "E", "top-k", "r", "skewed", "frozen, ms", *IMPLEMENTATIONS[1:], "dk: allocated", "overhead gone"
    )
    lines: dict[tuple[Any, ...], dict[str, Mapping[str, Any]]] = {}
    for row in rows:
        lines.setdefault(tuple(row[name] for name in ("T", "E", "top_k", "r", "skewed")), {})[row["impl"]] = row
    for (T, E, top_k, r, skewed), each in lines.items():
        ratios = {name: row["ratio_to_frozen"] for name, row in each.items()}
        words = [f"{ratios[name]:.2f}" if name in ratios else "" for name in IMPLEMENTATIONS[1:]]
        if "dk" in each:
            words.append(f"{each['dk']['allocated_mib'] / each['frozen']['allocated_mib']:.2f}")
            known = ratios.get("peft", 1.0) > 1
            words.append(f"{1 - (ratios['dk'] - 1) / (ratios['peft'] - 1):.0%}" if known else "")
        sizes = [*map(str, (T, E, top_k, r)), "yes" if skewed else ""]
        shown.add_row(*sizes, f"{each['frozen']['median_ms']:.1f}", *words)
    return shown


def cases(options: argparse.Namespace) -> Iterator[ExpertsCase]:
    """Every choice of sizes, of which a token chooses no more experts than there are."""
    dtype = getattr(torch, options.dtype)
    for E, top_k, r, T in itertools.product(options.experts, options.top_k, options.rank, options.tokens):
        if top_k <= E:
            yield ExpertsCase(T, E, top_k, options.hidden, options.inner, r, dtype, options.skewed)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--rounds", type=int, default=20, help="default: 20")
    parser.add_argument("--threads", type=int, default=2, help="of a CPU; default: 2")
    parser.add_argument("--out", type=Path, help="write the record here, as JSON")
    parser.add_argument("--tokens", type=int, nargs="+", default=[512, 2048, 8192], help="default: 512 2048 8192")
    parser.add_argument("--experts", type=int, nargs="+", default=[32], help="default: 32")
    parser.add_argument("--top-k", type=int, nargs="+", default=[4], help="default: 4")
    parser.add_argument("--hidden", type=int, default=1024, help="default: 1024")
    parser.add_argument("--inner", type=int, default=384, help="default: 384")
    parser.add_argument("--rank", type=int, nargs="+", default=[8], help="default: 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--skewed", action="store_true", help="half of the experts have no token, one has half")
    parser.add_argument("--impl", nargs="+", choices=IMPLEMENTATIONS[1:], help="beside frozen; default: all")
    parser.add_argument("--quick", action="store_true", help="small blocks, 5 rounds; sizes above are ignored")
    parser.add_argument("--table", action="store_true", help="the cases of docs/experts.md; sizes above are ignored")
    parser.add_argument(
        "--summary", action="store_true", help="print a line for each case, at the end; as --table does"
    )
    parser.add_argument("--resume", action="store_true", help="measure what is not in the file of --out")
    options = parser.parse_args(argv)
    if options.resume and options.out is None:
        parser.error("--resume needs --out, the record that it goes on with")
    torch.set_num_threads(options.threads)
    count = 5 if options.quick else options.rounds
    budget = Budget(seconds=SECONDS if options.table else 0, least=5 if options.table else count, most=count, warmup=2)
    chosen = None if options.impl is None else ("frozen", *options.impl)
    try:
        record = record_of(options.out, options.device, options.resume)
    except ValueError as error:
        parser.error(str(error))
    rows: list[dict[str, Any]] = []
    for case in QUICK if options.quick else TABLE if options.table else cases(options):
        names, began = chosen or (of_table(case) if options.table else IMPLEMENTATIONS), time.perf_counter()
        found = of_case(record["rows"], case, names) or measure(case, options.device, budget, names)
        rows += found
        write(rows, options, record["machine"])
        if not options.summary:
            Console(width=110).print(table(found), f"{time.perf_counter() - began:.0f} s")
    if options.summary or options.table:
        Console(width=120).print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
