"""What adapters cost in a diffusion model: SDXL's layers, and a training step of a small U-Net.

    python -m benchmarks.diffusion  # LoRA, DoRA, DeLoRA on every shape; two threads, or a GPU
    python -m benchmarks.diffusion --quick  # fewer rounds and cases: two minutes on two cores
    python -m benchmarks.diffusion --case conv-640 --method dora --out runs/diffusion.json

Each layer alone, batch 1, forward and backward with x needing its gradient and float32 factors of
rank 16: attention at 4096 tokens of width 640 and 1024 of 1280, the text's keys (77 tokens of
2048), feed-forward, and 3 x 3 convolutions in channels last. The step is one of an SDXL-like U-Net
with adapters on attention, feed-forward and convolutions (DeLoRA, which PEFT has not on
convolutions, on linears), by diffusers where that is installed. `frozen`, `peft` and `dk` (the
same, accelerated) take turns. Beside the time stand the bytes kept for backward, x and parameters
left out, and the peak beyond what was there.
"""

import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, NamedTuple

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.memory import MIB, allocations, kept_bytes
from benchmarks.overhead import interval, parser_of, write
from benchmarks.timing import Budget, clock_of, rounds

IMPLEMENTATIONS = ("frozen", "peft", "dk")
METHODS = ("lora", "dora", "delora")


class Layer(NamedTuple):
    """A linear's T, K, N, or a convolution's width and the side of its picture."""

    T: int
    K: int
    N: int
    side: int = 0


LAYERS: dict[str, Layer] = {
    "attention-640": Layer(4096, 640, 640),
    "attention-1280": Layer(1024, 1280, 1280),
    "text-640": Layer(77, 2048, 640),
    "text-1280": Layer(77, 2048, 1280),
    "feed-forward-1280": Layer(1024, 5120, 1280),
    "conv-320": Layer(16384, 320, 320, side=128),
    "conv-640": Layer(4096, 640, 640, side=64),
    "conv-1280": Layer(1024, 1280, 1280, side=32),
}
STEP = "unet-step"
QUICK = ("attention-640", "attention-1280", "text-1280", "conv-640", STEP)


class Case(NamedTuple):
    """The three modules of a case, and a call of one → its output; `inputs` are not weighed."""

    modules: dict[str, nn.Module]
    call: Callable[[nn.Module], Tensor]
    inputs: list[Tensor]


def config(method: str, r: int, targets: list[str]) -> Any:
    """Return a PEFT config whose adapters are away from their start."""
    if method == "delora":
        return peft.DeloraConfig(r=r, target_modules=targets, init_weights=False)
    return peft.LoraConfig(r=r, target_modules=targets, use_dora=method == "dora", init_lora_weights=False)


def layer_case(shape: Layer, method: str, r: int, device: str) -> Case:
    """Return a layer with random weights; a convolution's in channels last, but for its factors,
    which PEFT's DoRA wants contiguous.
    """
    T, K, N, side = shape
    x = torch.randn(1, K, side, side, device=device) if side else torch.randn(1, T, K, device=device)
    if side:
        x = x.to(memory_format=torch.channels_last)

    def made() -> Any:
        torch.manual_seed(0)
        base = nn.Conv2d(K, N, 3, padding=1) if side else nn.Linear(K, N)
        model = nn.Sequential(base).to(device)
        if side:
            model = model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return peft.get_peft_model(model, config(method, r, ["0"])).base_model.model[0]

    plain, fused = made(), made()
    dk.accelerate(fused, strict=True)
    x.requires_grad_()
    return Case({"frozen": plain.base_layer, "peft": plain, "dk": fused}, lambda module: module(x), [x])


def unet_case(method: str, r: int, device: str, widths: Sequence[int] = (64, 128), side: int = 32) -> Case:
    """Return a small U-Net of SDXL's kind.

    Raises:
        ImportError: diffusers is not installed.
    """
    from diffusers import UNet2DConditionModel

    def made(adapted: bool) -> Any:
        torch.manual_seed(0)
        model = UNet2DConditionModel(
            sample_size=side,
            layers_per_block=1,
            block_out_channels=tuple(widths),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=2 * widths[0],
            attention_head_dim=tuple(width // 16 for width in widths),
            norm_num_groups=8,
            use_linear_projection=True,
        ).to(device)
        model.requires_grad_(False)
        kinds = (nn.Linear,) if method == "delora" else (nn.Linear, nn.Conv2d)
        if adapted:
            model.add_adapter(config(method, r, [n for n, m in model.named_modules() if isinstance(m, kinds)]))
        return model

    frozen, plain, fused = made(False), made(True), made(True)
    dk.accelerate(fused, strict=True)
    x = torch.randn(1, 4, side, side, device=device, requires_grad=True)
    text = torch.randn(1, 77, 2 * widths[0], device=device)

    def call(module: nn.Module) -> Tensor:
        y: Tensor = module(x, 500, encoder_hidden_states=text).sample
        return y

    return Case({"frozen": frozen, "peft": plain, "dk": fused}, call, [x, text])


def case_of(name: str, method: str, r: int, device: str) -> Case:
    """Return a case by its name."""
    return unet_case(method, r, device) if name == STEP else layer_case(LAYERS[name], method, r, device)


def step(case: Case, module: nn.Module) -> None:
    """Run forward and backward, and give the gradients back."""
    y = case.call(module)
    y.backward(torch.ones_like(y))
    for tensor in (*case.inputs, *module.parameters()):
        tensor.grad = None


def measure(name: str, method: str, r: int, device: str, budget: Budget) -> list[dict[str, Any]]:
    """Return a row for each implementation."""
    case = case_of(name, method, r, device)
    steps = {impl: partial(step, case, module) for impl, module in case.modules.items()}
    times = {impl: [ms for ms, _ in spent] for impl, spent in rounds(steps, clock_of(device), budget).items()}
    rows = []
    for impl, module in case.modules.items():
        row: dict[str, Any] = {"case": name, "method": method, "r": r, "impl": impl}
        row |= {"median_ms": statistics.median(times[impl]), "rounds": len(times[impl])}
        for rival in ("frozen", "peft"):
            found = interval(lambda medians, a=impl, b=rival: medians[a] / medians[b], times)  # type: ignore[misc]
            row |= {f"over_{rival}": found[0], f"over_{rival}_interval": found[1:]}
        kept = kept_bytes(partial(case.call, module), [*case.inputs, *module.parameters()])
        peak = allocations(steps[impl], device, warm=True).peak
        rows.append(row | {"saved_mib": kept / MIB, "peak_mib": peak / MIB})
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> Table:
    """Return the rows as people read them."""
    shown = Table("case", "method", "impl", "ms", "over frozen", "over PEFT", "kept, MiB", "peak, MiB")
    for row in rows:
        low, high = row["over_peft_interval"]
        over = (f"{row['over_frozen']:.2f}", f"{row['over_peft']:.2f} ({low:.2f} to {high:.2f})")
        memory = (f"{row['saved_mib']:.1f}", f"{row['peak_mib']:.1f}")
        shown.add_row(row["case"], row["method"], row["impl"], f"{row['median_ms']:.1f}", *over, *memory)
    return shown


def main(argv: Sequence[str] | None = None) -> int:
    """Measure, print a table, write the record."""
    parser = parser_of(__doc__, rounds=15)
    parser.add_argument("--case", choices=[*LAYERS, STEP], action="append", help="default: all")
    parser.add_argument("--quick", action="store_true", help="three rounds of the cases that say most")
    parser.add_argument("--rank", type=int, default=16, help="default: 16")
    options = parser.parse_args(argv)
    torch.set_num_threads(options.threads)
    count = 3 if options.quick else options.rounds
    budget = Budget(seconds=0, least=count, most=count, warmup=1)
    rows: list[dict[str, Any]] = []
    for name in options.case or (QUICK if options.quick else [*LAYERS, STEP]):
        for method in options.method or METHODS:
            if method == "delora" and name.startswith("conv"):
                continue
            try:
                rows += measure(name, method, options.rank, options.device, budget)
            except ImportError as error:
                print(f"{name}: left out, {error}")
                break
    Console().print(table(rows))
    write(rows, options)
    return 0 if rows else 1


if __name__ == "__main__":
    sys.exit(main())
