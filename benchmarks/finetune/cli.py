"""The command line: arguments, defaults that depend on the device, exit codes."""

import argparse
import importlib
import sys
import time
from collections.abc import Callable, Sequence
from itertools import islice
from pathlib import Path
from typing import TypeVar

from benchmarks.finetune.config import METHODS, Config, Problem

NEEDED = (
    "torch",
    "transformers",
    "peft",
    "gguf",
    "accelerate",
    "matplotlib",
    "psutil",
    "rich",
    "tqdm",
    "delora_kernels",
)
FAILED, USAGE_ERROR, INTERRUPTED = 1, 2, 130
Number = TypeVar("Number", int, float)


def main(argv: Sequence[str] | None = None, began: float | None = None) -> int:
    """Run the demo and return its exit code.

    0: done; 1: done, and the verdict is that the losses differ too much; 2: bad input, told in one
    line; 130: Ctrl-C, report written.

    Args:
        argv: The arguments; None: the process's.
        began: The value of `time.monotonic()` when the command began; None: now.
    """
    began = time.monotonic() if began is None else began
    args = _parser().parse_args(argv)
    try:
        _check_packages()
        config = _settings(args)
        from benchmarks.finetune.demo import run

        result = run(config, began)
        if result.interrupted:
            return INTERRUPTED
        verdict = result.verdict()
        return FAILED if verdict is not None and not verdict.passed else 0
    except Problem as problem:
        print(f"finetune: {problem}", file=sys.stderr)
        return USAGE_ERROR
    except KeyboardInterrupt:
        print("finetune: interrupted before a report could be written", file=sys.stderr)
        return INTERRUPTED


def _parser() -> argparse.ArgumentParser:
    """Return the arguments; None stands for a default that depends on the device."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.finetune",
        description="Fine-tune a small language model with PEFT adapters, eager and accelerated side by side.",
        argument_default=None,
    )
    add = parser.add_argument
    add("--method", choices=METHODS, default="delora", help="adapter method [%(default)s]")
    add("--model", metavar="PATH_OR_ID", help="directory, .gguf file or hub id; without it: SmolLM2-135M-Instruct")
    add("--data", metavar="FILE", nargs="+", type=Path, default=[], help="text files; without them: pydoc's topics")
    add("--rank", type=_at_least(int, 1), default=16, help="adapter rank; of all GOAT experts together [%(default)s]")
    add("--steps", type=_at_least(int, 1), help="steps of each run; without it: 60, on a CPU what fits into 5 minutes")
    add("--seq-len", type=_at_least(int, 2), help="tokens per sequence; without it: up to 256, on a GPU 512")
    add(
        "--batch-size",
        type=_at_least(int, 1),
        help="sequences per forward pass; without it: at most 2 on a CPU, 16 on a GPU",
    )
    add(
        "--accumulation",
        type=_at_least(int, 1),
        default=1,
        metavar="N",
        help="forward and backward passes whose gradients one step sums [%(default)s]",
    )
    add("--checkpointing", action="store_true", default=False, help="recompute activations in the backward pass")
    add("--lr", type=_above(0.0), default=2e-3, help="AdamW's learning rate after warm-up [%(default)s]")
    add(
        "--delora-lambda",
        type=_above(0.0),
        default=1.0,
        help="DeLoRA's initial bound (PEFT's 15 suits wider models) [%(default)s]",
    )
    add(
        "--seed",
        type=_at_least(int, 0),
        default=0,
        help="seeds the adapters and the order of the batches [%(default)s]",
    )
    add("--dtype", choices=("bf16", "fp32"), help="frozen base; without it: bf16 where the device computes it fast")
    add(
        "--quantise",
        choices=("nf4",),
        help="store the base's linears in 4 bits, by bitsandbytes (LoRA, DoRA, DeLoRA); they multiply in --dtype",
    )
    add("--autocast", action=argparse.BooleanOptionalAction, help="bf16 autocast; without it: on with --dtype bf16")
    add(
        "--scaler",
        action="store_true",
        default=False,
        help="scale the loss with torch.amp.GradScaler; on a GPU autocast is then fp16, and on",
    )
    add("--device", help="cuda, cpu, ...; without it: a GPU if there is one")
    add("--threads", type=_at_least(int, 1), help="CPU threads; without it: torch's choice")
    add("--minutes", type=_above(0.0), help="take fewer steps if the whole run would last longer")
    add(
        "--yardstick",
        type=_at_least(int, 0),
        default=15,
        metavar="STEPS",
        help="steps of an eager run that is nudged at its start, or with --accumulation of runs that sum in other "
        "orders; 0: none [%(default)s]",
    )
    add(
        "--orders",
        type=_at_least(int, 1),
        metavar="RUNS",
        help="eager runs that sum in other orders, with --accumulation; without it: 3, or as many as there are",
    )
    add(
        "--rounds",
        type=_at_least(int, 0),
        default=20,
        help="rounds of the first table, at most: frozen, PEFT and ours with LoRA, DoRA, DeLoRA; 0: none [%(default)s]",
    )
    add("--no-times", dest="times", action="store_false", default=True, help="report no durations: a busy machine")
    add("--note", metavar="TEXT", help="kept in the report")
    add("--out", type=Path, help="folder for the report; without it: runs/finetune-<method>-<time>")
    return parser


def _at_least(kind: Callable[[str], Number], low: Number) -> Callable[[str], Number]:
    """Return an argparse type that rejects numbers below `low`."""

    def parse(text: str) -> Number:
        value = kind(text)
        if not low <= value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be at least {low}, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def _above(low: float) -> Callable[[str], float]:
    """Return an argparse type that rejects numbers that are not above `low`."""

    def parse(text: str) -> float:
        value = float(text)
        if not low < value < float("inf"):
            raise argparse.ArgumentTypeError(f"must be above {low:g}, got {text}")
        return value

    parse.__name__ = "number"
    return parse


def _check_packages() -> None:
    """Import what the demo needs, so that a missing package is known before anything is loaded."""
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            name = error.name or name
            raise Problem(f"the Python package {name!r} is missing: `pip install {name}`") from None


def _orders(accumulation: int, batch_size: int, wanted: int | None) -> int:
    """In how many other orders the sequences of a step are to be summed."""
    from benchmarks.finetune.orders import orders

    found = sum(1 for _ in islice(orders(accumulation, batch_size), wanted or 3))
    if found < (wanted or 1):
        raise Problem(
            f"--accumulation {accumulation} with --batch-size {batch_size} has {found} other orders of summation, of "
            f"{wanted or 1} wanted: give fewer --orders, more --accumulation or --batch-size, or --yardstick 0"
        )
    return found


def _settings(args: argparse.Namespace) -> Config:
    """Check the files and fill in the defaults that depend on the device."""
    import torch

    for path in args.data:
        if not path.is_file():
            raise Problem(f"no such text file: {path}")
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise Problem(f"cannot use device {device!r}: {str(error).splitlines()[0]}") from None
    if args.quantise is not None and args.method not in ("lora", "dora", "delora"):
        raise Problem(f"--quantise goes with --method lora, dora or delora, not {args.method}")
    gpu = device.startswith("cuda")
    batch_size = args.batch_size or (16 if gpu else 2)
    orders = _orders(args.accumulation, batch_size, args.orders) if args.yardstick and args.accumulation > 1 else 0
    dtype = args.dtype or ("bf16" if gpu or _fast_bf16_on_cpu() else "fp32")
    steps = args.steps or 60
    minutes = args.minutes or (None if gpu or args.steps else 5.0)
    chosen = args.steps or args.seq_len or args.batch_size or args.accumulation > 1
    return Config(
        method=args.method,
        model=args.model,
        data=tuple(args.data),
        rank=args.rank,
        steps=steps,
        seq_len=args.seq_len or (512 if gpu else 256),
        batch_size=batch_size,
        lr=args.lr,
        warmup=min(5, steps // 4),
        delora_lambda=args.delora_lambda,
        seed=args.seed,
        dtype=dtype,
        autocast=dtype == "bf16" or (gpu and args.scaler) if args.autocast is None else args.autocast,
        device=device,
        threads=args.threads,
        minutes=minutes,
        yardstick=min(args.yardstick, steps),
        heldout_blocks=64 if gpu else 16,
        out=args.out or Path("runs") / f"finetune-{args.method}-{time.strftime('%Y%m%d-%H%M%S')}",
        checkpointing=args.checkpointing,
        accumulation=args.accumulation,
        scaler=args.scaler,
        orders=orders,
        times=args.times,
        note=args.note,
        sized=minutes is not None and not gpu and not chosen,
        rounds=args.rounds if args.times else 0,
        quantise=args.quantise,
        most_threads=args.threads or torch.get_num_threads(),
    )


def _fast_bf16_on_cpu() -> bool:
    """Whether this CPU multiplies bf16 in hardware (elsewhere bf16 is emulated and slower than
    fp32).
    """
    import torch

    found = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return any(found.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16"))
