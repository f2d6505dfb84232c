"""Training: several runs advance together, one step each in turn, so that a noisy machine disturbs
them alike.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from statistics import fmean

import torch
from torch import nn

from benchmarks.finetune.config import Config
from benchmarks.finetune.model import DTYPES
from benchmarks.finetune.probe import MIB, kept_mib
from delora_kernels.nn import set_loss_scale

SHORTEST = 16
"""Tokens of a sequence that are left where a run has to hurry."""

LONGER = 1.25
"""What the next step may take of the last one's time."""


@dataclass
class Run:
    """One model in training, and what was measured of it.

    Attributes:
        name: what the report calls it.
        model: the adapted model; only its adapters are trained.
        losses: training loss of each step, in nats per token.
        step_ms: duration of each step, in ms.
        tokens: tokens of each step.
        peak_mib: memory of each step above what was allocated before it, in MiB; empty on a CPU.
        kept_mib: what one forward pass keeps for backward, in MiB.
        heldout: held-out loss before and after training.
        scaler: scales the loss; a disabled one leaves everything as it is.
        order: the order in which this run takes the rows of a batch, int64 `[sequences_per_step]`;
            None: as they come.
        skipped: steps that the scaler skipped because a gradient overflowed.
    """

    name: str
    model: nn.Module
    losses: list[float] = field(default_factory=list)
    step_ms: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    peak_mib: list[float] = field(default_factory=list)
    kept_mib: float | None = None
    heldout: list[float] = field(default_factory=list)
    scaler: torch.amp.GradScaler = field(default_factory=lambda: torch.amp.GradScaler("cpu", enabled=False))
    order: torch.Tensor | None = None
    skipped: int = 0

    def __post_init__(self) -> None:
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, weight_decay=0.0)


def autocast(config: Config) -> torch.autocast:
    """Return the context of a forward pass."""
    return torch.autocast(torch.device(config.device).type, DTYPES[config.autocast_dtype], enabled=config.autocast)


def loss_of(run: Run, batch: torch.Tensor, config: Config) -> torch.Tensor:
    """Mean next-token loss of `batch` `[sequences, tokens]` int64."""
    with autocast(config):
        loss: torch.Tensor = run.model(input_ids=batch, labels=batch, use_cache=False).loss
    return loss


def step(run: Run, batch: torch.Tensor, lr: float, config: Config) -> None:
    """One optimiser step: forward, backward, clip the gradient norm to 1, update; records loss, ms
    and peak MiB.

    Args:
        run: what to train.
        batch: `[sequences_per_step, seq_len]`; each `batch_size` rows of it go forward and backward
            by themselves.
        lr: the learning rate.
        config: `batch_size`, autocast.
    """
    gpu, scale = batch.is_cuda, run.scaler.get_scale()
    set_loss_scale(run.model, scale / config.accumulation)
    run.optimizer.zero_grad(set_to_none=True)
    for group in run.optimizer.param_groups:
        group["lr"] = lr
    if gpu:
        torch.cuda.synchronize(batch.device)
        torch.cuda.reset_peak_memory_stats(batch.device)
        resident = torch.cuda.memory_allocated(batch.device)
    start = time.perf_counter()
    losses = []
    if run.order is not None:
        batch = batch[run.order.to(batch.device)]
    for part in batch.split(config.batch_size):
        loss = loss_of(run, part, config)
        run.scaler.scale(loss / config.accumulation).backward()
        losses.append(loss.detach())
    run.scaler.unscale_(run.optimizer)
    torch.nn.utils.clip_grad_norm_(run.trained, 1.0)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    value = fmean(loss.item() for loss in losses)
    if gpu:
        torch.cuda.synchronize(batch.device)
    elapsed = time.perf_counter() - start
    run.losses.append(value)
    run.tokens.append(batch.numel())
    run.skipped += run.scaler.get_scale() < scale
    run.step_ms.append(1e3 * elapsed)
    if gpu:
        run.peak_mib.append((torch.cuda.max_memory_allocated(batch.device) - resident) / MIB)


def evaluate(run: Run, rows: torch.Tensor, config: Config, done: Callable[[int], object] = int) -> float:
    """Return the mean loss over `rows` `[sequences, tokens]`, without training on them; `done`
    hears of each batch.
    """
    run.model.eval()
    total = 0.0
    with torch.no_grad():
        for batch in rows.split(config.batch_size):
            total += len(batch) * loss_of(run, batch.to(config.device), config).item()
            done(len(batch))
    run.model.train()
    return total / len(rows)


def probe(run: Run, batch: torch.Tensor, config: Config) -> None:
    """Measure what one forward pass keeps for backward; it also warms up caches and compiled
    kernels.
    """
    run.kept_mib = kept_mib(run.model, lambda: loss_of(run, batch.to(config.device), config))


def race(
    pair: Sequence[Run],
    extras: Sequence[Run],
    stream: Iterator[torch.Tensor],
    config: Config,
    deadline: float = float("inf"),
    least: int = 1,
) -> Iterator[int]:
    """Advance every run by one step on the same batch, again and again; yield the number of steps
    done.

    Who goes first alternates, so that neither of the pair always finds the caches warm. Where even
    the least steps would come too late, the further runs stay behind and sequences are cut.

    Args:
        pair: the runs to compare.
        extras: runs that go along, last, for the first `config.yardstick` steps.
        stream: batches `[sequences_per_step, seq_len]`.
        config: steps, warm-up, learning rate.
        deadline: the value of `time.monotonic()` by which to be done.
        least: steps that are taken whatever the time.
    """
    lasted, length = 0.0, config.seq_len
    for done in range(config.steps):
        began = time.monotonic()
        if done >= least and began + lasted > deadline:
            return
        needed, left = (least - done) * lasted, max(deadline - began, 0.0)
        late = needed > left
        if late:
            length = max(min(SHORTEST, length), int(length * left / needed))
        batch = next(stream)[:, :length].to(config.device)
        lr = config.lr * min(1.0, (done + 1) / (config.warmup + 1))
        for run in pair if done % 2 == 0 else reversed(pair):
            step(run, batch, lr, config)
        for run in extras if done < config.yardstick and not late else ():
            step(run, batch, lr, config)
        lasted = LONGER * (time.monotonic() - began)
        yield done + 1
