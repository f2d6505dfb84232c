"""`python -m benchmarks.method_comparison`: LoRA, DeLoRA, DoRA and GOAT on one model at the same
total rank.

Every method is fine-tuned from the same base model on the same batches, all of them one step each
in turn, in an order that rotates, so that a noisy machine disturbs them alike; again for each seed,
which draws the adapters and the order of the batches. All layers run fused; the learning rates are
tuned for none of them. The record has every loss and duration; --plot FILE shows held-out loss,
time and memory, --record FILE shows a record that is there.
"""

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, median
from typing import Any

METHODS = ("lora", "delora", "dora", "goat-alpha", "goat-theory")
LABELS = {
    "lora": "LoRA",
    "delora": "DeLoRA",
    "dora": "DoRA",
    "goat-alpha": "GOAT, s = α/r",
    "goat-theory": "GOAT, s = √(3ηK/r)",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, write the record after every seed, print the table; 2: bad input, told in one line."""
    args = _parser().parse_args(argv)
    from benchmarks.finetune.config import Problem

    try:
        record = run(args) if args.record is None else json.loads(args.record.read_text(encoding="utf-8"))
    except Problem as problem:
        print(f"method_comparison: {problem}", file=sys.stderr)
        return 2
    from rich.console import Console

    Console().print(table(record))
    if args.plot is not None:
        plot(record).savefig(args.plot, dpi=150)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.method_comparison", description=__doc__)
    add = parser.add_argument
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="[all]")
    add("--model", metavar="PATH_OR_ID", help="as for the demo; without it: SmolLM2-135M-Instruct")
    add("--seeds", type=int, default=3, metavar="N", help="seeds 0 to N - 1 [%(default)s]")
    add("--steps", type=int, default=60, help="of each method and seed [%(default)s]")
    add("--rank", type=int, default=16, help="adapter rank; of all GOAT experts together [%(default)s]")
    add("--seq-len", type=int, default=128, help="tokens per sequence [%(default)s]")
    add("--batch-size", type=int, default=2, help="sequences per step [%(default)s]")
    add("--heldout", type=int, default=16, metavar="ROWS", help="held-out sequences that are evaluated [%(default)s]")
    add("--lr", type=float, default=2e-3, help="AdamW's; GOAT with s = α/r takes lr / s [%(default)s]")
    add("--dtype", choices=("bf16", "fp32"), default="fp32", help="frozen base; bf16 runs under autocast [%(default)s]")
    add("--device", default="cpu", help="[%(default)s]")
    add("--threads", type=int, help="CPU threads; without it: torch's choice")
    add("--note", help="kept in the record")
    add("--out", type=Path, default=Path("runs/methods.json"), help="the record [%(default)s]")
    add("--plot", type=Path, metavar="FILE", help="draw the record too")
    add("--record", type=Path, metavar="FILE", help="run nothing: show this record")
    return parser


def run(args: argparse.Namespace) -> dict[str, Any]:
    """All seeds of all methods; the record so far is on the disk after each seed."""
    import torch
    from tqdm import tqdm

    import delora_kernels as dk
    from benchmarks.finetune import model, text
    from benchmarks.finetune.train import Run, evaluate, probe, step
    from benchmarks.machine import machine_info

    if args.threads is not None:
        torch.set_num_threads(args.threads)
    configs = {method: _config(args, method) for method in args.methods}
    first = next(iter(configs.values()))
    source = model.find(args.model)
    base, tokenizer = model.load(source, first)
    train, heldout = (text.blocks(part, tokenizer, args.seq_len) for part in text.split(text.documents()))
    heldout = text.spread(heldout, args.heldout)
    settings = {name: value for name, value in vars(args).items() if name not in ("out", "plot", "record", "model")}
    record: dict[str, Any] = {
        "machine": machine_info(args.device),
        "model": source.name,
        "config": settings,
        "rows": [],
    }
    starts = {method: _adapted(base, config) for method, config in configs.items()}
    with tqdm(total=args.seeds * args.steps * len(configs), unit="step") as bar:
        for seed in range(args.seeds):
            runs = {method: Run(LABELS[method], _seeded(start, seed)) for method, start in starts.items()}
            for method, each in runs.items():
                bar.set_description(f"seed {seed}, {LABELS[method]}: memory, held-out loss")
                probe(each, train[: args.batch_size], configs[method])
                each.heldout.append(evaluate(each, heldout, configs[method]))
            stream = text.batches(train, args.batch_size, seed)
            for done in range(args.steps):
                batch = next(stream).to(args.device)
                turn = done % len(runs)
                for method, each in [*runs.items()][turn:] + [*runs.items()][:turn]:
                    bar.set_description(f"seed {seed}, {LABELS[method]}")
                    step(each, batch, configs[method].lr * min(1.0, (done + 1) / (first.warmup + 1)), configs[method])
                    bar.update()
            for method, each in runs.items():
                with dk.watch_experts(each.model) as watch:
                    each.heldout.append(evaluate(each, heldout, configs[method]))
                record["rows"].append(_row(method, seed, each, configs[method], watch))
            args.out.parent.mkdir(parents=True, exist_ok=True)
            args.out.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    return record


def _config(args: argparse.Namespace, method: str) -> Any:
    """Return the demo's settings for one method."""
    from benchmarks.finetune.config import Config
    from benchmarks.finetune.goat import EXPERTS

    published = 2 * min(EXPERTS, args.rank)  # s = alpha / r of GOAT's scripts: alpha is twice the rank of all experts
    return Config(
        method=method.partition("-")[0],
        model=args.model,
        data=(),
        rank=args.rank,
        steps=args.steps,
        seq_len=args.seq_len,
        batch_size=args.batch_size,
        lr=args.lr / published if method == "goat-alpha" else args.lr,
        warmup=min(5, args.steps // 4),
        delora_lambda=1.0,
        seed=0,
        dtype=args.dtype,
        autocast=args.dtype == "bf16",
        device=args.device,
        threads=args.threads,
        minutes=None,
        yardstick=0,
        heldout_blocks=args.heldout,
        out=args.out,
        scaling="alpha/r" if method == "goat-alpha" else "theory",
    )


def _adapted(base: Any, config: Any) -> Any:
    """Return the base with fused adapters of one method; the frozen parameters are the base's
    own.
    """
    from benchmarks.finetune import model

    adapted = model.adapt(model.twin(base.requires_grad_(False)), config)
    model.fuse(adapted)
    return adapted


def _seeded(start: Any, seed: int) -> Any:
    """Return a copy whose random parameters are drawn anew: all but GOAT's factors, which an SVD
    has made.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    from benchmarks.finetune import model
    from delora_kernels.integrations.peft.methods.goat import PeftGoatLinear

    made = model.twin(start)
    torch.manual_seed(seed)
    for layer in made.modules():
        if isinstance(layer, PeftGoatLinear):
            torch.nn.init.kaiming_uniform_(layer.goat_router["default"], a=math.sqrt(5))
        elif isinstance(layer, BaseTunerLayer):
            for name in ("lora_A", "delora_A"):
                factor = getattr(layer, name, {"default": None})["default"]
                if factor is not None:
                    torch.nn.init.kaiming_uniform_(getattr(factor, "weight", factor), a=math.sqrt(5))
    return made


def _row(method: str, seed: int, each: Any, config: Any, watch: Any) -> dict[str, Any]:
    """Return what one run gave; `watch` saw its routers on the held-out text after training."""
    row = {
        "method": method,
        "seed": seed,
        "lr": config.lr,
        "trained_parameters": sum(p.numel() for p in each.trained),
        "heldout_loss": each.heldout,
        "median_ms": median(each.step_ms),
        "kept_mib": each.kept_mib,
        "peak_mib": max(each.peak_mib, default=None),
        "losses": each.losses,
        "step_ms": each.step_ms,
    }
    return row | ({"experts": watch.report().summary()} if watch.counted else {})


def table(record: dict[str, Any]) -> Any:
    """Means over the seeds; in brackets the lowest and the highest."""
    from rich.table import Table

    c = record["config"]
    size = f"{c['batch_size']} x {c['seq_len']} tokens, {c['steps']} steps, rank {c['rank']}, {c['seeds']} seeds"
    found = Table("method", title=f"{record['model']}, {size}")
    for name in ("held-out loss before", "after", "ms a step", "kept for backward (MiB)", "trained parameters"):
        found.add_column(name, justify="right")
    for method in c["methods"]:
        rows = [row for row in record["rows"] if row["method"] == method]
        after = [row["heldout_loss"][1] for row in rows]
        found.add_row(
            LABELS[method],
            f"{fmean(row['heldout_loss'][0] for row in rows):.3f}",
            f"{fmean(after):.3f} ({min(after):.3f} to {max(after):.3f})",
            f"{fmean(row['median_ms'] for row in rows):.0f}",
            f"{fmean(row['kept_mib'] for row in rows):.0f}",
            f"{rows[0]['trained_parameters']:,}",
        )
    return found


def plot(record: dict[str, Any]) -> Any:
    """Held-out loss after training, a dot for each seed; time of a step; what is kept for
    backward.
    """
    from matplotlib.figure import Figure

    methods = record["config"]["methods"]
    figure = Figure(figsize=(11.0, 3.6), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    for index, method in enumerate(methods):
        rows = [row for row in record["rows"] if row["method"] == method]
        after = [row["heldout_loss"][1] for row in rows]
        panels[0].plot(after, [index] * len(after), "o", color="#0072B2", alpha=0.6)
        panels[0].plot(fmean(after), index, "|", color="black", markersize=16)
        panels[1].barh(index, fmean(row["median_ms"] for row in rows), color="#0072B2", height=0.6)
        panels[2].barh(index, fmean(row["kept_mib"] for row in rows), color="#E69F00", height=0.6)
    before = [row["heldout_loss"][0] for row in record["rows"] if not row["method"].startswith("goat")]
    if before:  # these start as the base model
        panels[0].axvline(fmean(before), color="0.6", linestyle="--")
    panels[0].set_yticks(range(len(methods)), [LABELS[method] for method in methods])
    panels[0].invert_yaxis()
    titles = (
        "held-out loss" + (" (dashed: base model)" if before else ""),
        "ms a step (median)",
        "kept for backward (MiB)",
    )
    for axes, title in zip(panels, titles, strict=True):
        axes.set_title(title, fontsize=10)
        axes.spines[["top", "right"]].set_visible(False)
    machine, c = record["machine"], record["config"]
    commit = (machine["commit"] or "unknown")[:12]
    device = machine["device"] if machine["device"] != "cpu" else machine["cpu"]
    figure.suptitle(
        f"{record['model']}, rank {c['rank']}, {c['steps']} steps of {c['batch_size']} x {c['seq_len']} tokens, "
        f"{c['seeds']} seeds, {c['dtype']}, {device}, torch {machine['torch']}, commit {commit}",
        fontsize=9,
    )
    return figure


if __name__ == "__main__":
    sys.exit(main())
