"""A whole model trained: a Llama of random weights, sized to the device, with adapters on all its
linears.

Timed in turn: the model as PEFT makes it, through torch.compile, and accelerated; a step is
forward, backward, clipping and AdamW. Reported: step time, tokens/s, the step's peak above what was
resident, what is kept for backward, and the longest sequence that trains within a memory limit.
Models share their frozen weights. The gate runs the first BLOCKS blocks in float64 too: loss and
gradients of the accelerated model may be twice as far from it as PEFT's.
"""

import copy
import gc
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.cases import PRECISIONS
from benchmarks.layer.measure import MEASURED, failure, out_of_memory
from benchmarks.memory import MIB, allocations, kept_bytes, only_new_garbage
from benchmarks.model_cases import ModelCase
from benchmarks.timing import Budget, Clock, interleaved
from delora_kernels.testing import relative_error

Row = dict[str, Any]
BLOCKS = 2
GRANULE = 32
"""Sequence lengths are multiples of it."""


@only_new_garbage()
def measure_model(case: ModelCase, device: str, clock: Clock, budget: Budget, only: tuple[str, ...] = ()) -> list[Row]:
    """Return the rows of one case: PEFT's model, its compiled form, ours."""
    names = ["peft", "dk", *(["peft-compile"] if case.compiled else [])]
    columns = {"kind": "model", **case.columns(), **dict.fromkeys(MEASURED), "status": "ok"}
    rows = {name: {**columns, "impl": name} for name in names if not only or name in only or name == "peft"}
    try:
        wrong = _gate(case, device)
        base = adapted(case, device, case.blocks)
    except Exception as error:
        return [row | failure(error) for row in rows.values()]
    passes: dict[str, Callable[[], Any]] = {}

    def failed(name: str, error: Exception) -> None:
        rows[name] |= failure(error)
        passes.pop(name, None)

    for name, row in rows.items():
        if name == "dk" and wrong:
            row |= {"status": "failed", "note": wrong}
            continue
        try:
            trainer = Trainer(case, twin(base), name, device)
            weighed = allocations(trainer.step, device)
            row |= {"peak_mib": weighed.peak / MIB, "allocated_mib": weighed.total / MIB}
            trained = [*trainer.model.parameters(), *trainer.model.buffers()]
            row["saved_mib"] = kept_bytes(trainer.loss, trained) / MIB
            if case.limit_mib is not None and name != "peft-compile":
                row["longest_sequence"] = _longest(case, trainer, device)
            passes[name] = trainer.step
        except Exception as error:
            failed(name, error)
    for name, spent in interleaved(dict(passes), clock, budget, failed).items():
        rows[name] |= {"median_ms": spent.median_ms, "p20_ms": spent.p20_ms, "p80_ms": spent.p80_ms}
        rows[name] |= {"rounds": spent.rounds, "host_ms": spent.host_ms}
        rows[name]["tokens_per_s"] = 1e3 * case.batch * case.sequence / spent.median_ms
    return list(rows.values())


def adapted(case: ModelCase, device: str, blocks: int) -> Any:
    """PEFT's model on random frozen weights, in training mode."""
    import peft
    import transformers

    from benchmarks.layer.methods import METHODS

    sizes: dict[str, Any] = {"hidden_size": case.hidden, "intermediate_size": case.intermediate}
    sizes |= {
        "num_hidden_layers": blocks,
        "num_attention_heads": case.heads,
        "num_key_value_heads": case.kv_heads,
        "vocab_size": case.vocabulary,
    }
    torch.manual_seed(0)
    with torch.device(device):
        settings = transformers.LlamaConfig(max_position_embeddings=2**17, use_cache=False, **sizes)
        model: Any = transformers.LlamaForCausalLM(settings)
        model = model.to(PRECISIONS[case.precision].dtype)
        method = METHODS[case.method]
        assert method.peft_config is not None
        config = method.peft_config(case.r, 0.0)
        config.target_modules, config.task_type = "all-linear", "CAUSAL_LM"
        made: Any = peft.get_peft_model(model, config)
    if case.checkpointing:
        made.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return made.train()


def twin(model: nn.Module) -> Any:
    """Return a copy with adapters of its own on the same frozen tensors."""
    return copy.deepcopy(model, {id(p): p for p in model.parameters() if not p.requires_grad})


class Trainer:
    """One model under training.

    Args:
        case: How.
        model: What; changed in place.
        name: Implementation.
        device: Where.
    """

    def __init__(self, case: ModelCase, model: Any, name: str, device: str) -> None:
        self.case, self.device = case, device
        if name == "dk":
            dk.accelerate(model, strict=True)
        self.parameters = [p for p in model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.parameters, lr=1e-5)
        self.model: Any = torch.compile(model) if name == "peft-compile" else model

    def loss(self, sequence: int | None = None) -> Tensor:
        """Return the loss on random tokens, the same at every call."""
        shape = (self.case.batch, sequence or self.case.sequence)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(self.case.vocabulary, shape, generator=generator).to(self.device)
        dtype, _, autocast, _ = PRECISIONS[self.case.precision]
        with torch.autocast(torch.device(self.device).type, dtype, enabled=autocast):
            loss: Tensor = self.model(input_ids=tokens, labels=tokens).loss
        return loss

    def step(self, sequence: int | None = None) -> None:
        """One optimiser step."""
        self.loss(sequence).backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _gate(case: ModelCase, device: str) -> str:
    """Return what is wrong with the accelerated model; empty: nothing. Runs the first blocks, in
    float64 for the truth.
    """
    base = adapted(case, device, min(BLOCKS, case.blocks))
    sequence = min(case.sequence, 4 * GRANULE)
    found = {name: _results(Trainer(case, twin(base), name, device), sequence) for name in ("peft", "dk")}
    exact = ModelCase(**asdict(case) | {"precision": "fp32"})
    truth = _results(Trainer(exact, base.double(), "peft", device), sequence)
    floor = 8 * torch.finfo(PRECISIONS[case.precision].dtype).eps
    for what, value in truth.items():
        theirs, ours = (relative_error(found[name][what], value) for name in ("peft", "dk"))
        if not ours <= 2 * theirs + floor:
            return f"{what} is off by {ours:.1e}, PEFT's by {theirs:.1e}"
    return ""


def _results(trainer: Trainer, sequence: int) -> dict[str, Tensor]:
    """Return the loss and all gradients of each kind of adapter tensor as one vector: one rounded λ
    alone proves nothing.
    """
    loss = trainer.loss(sequence)
    loss.backward()
    kinds: dict[str, list[Tensor]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.grad is not None:
            kind = next(part for part in name.split(".") if part.startswith(("lora", "delora")))
            kinds.setdefault(f"gradient of {kind}", []).append(parameter.grad.flatten().double())
    trainer.optimizer.zero_grad(set_to_none=True)
    return {"loss": loss.detach().double()} | {kind: torch.cat(grads) for kind, grads in kinds.items()}


def _longest(case: ModelCase, trainer: Trainer, device: str) -> int:
    limit = (case.limit_mib or 0) * MIB

    def fits(sequence: int) -> bool:
        try:
            return allocations(lambda: trainer.step(sequence), device).peak <= limit
        except Exception as error:
            if not out_of_memory(error):
                raise
            error.__traceback__ = None
            trainer.optimizer.zero_grad(set_to_none=True)
            gc.collect()
            return False

    return longest_sequence(fits, case.sequence)


def longest_sequence(fits: Callable[[int], bool], start: int, most: int = 2**17) -> int:
    """Return the longest multiple of GRANULE that fits, to a sixteenth of its length; 0: none does.

    Args:
        fits: Whether a step at this length stays within the limit; larger lengths need more.
        start: Where the search begins.
        most: Where it ends.
    """
    low, high = 0, max(GRANULE, start // GRANULE * GRANULE)
    while high <= most and fits(high):
        low, high = high, 2 * high
    high = min(high, most + GRANULE)
    while high - low > max(GRANULE, low // 16):
        middle = (low + high) // 2 // GRANULE * GRANULE
        middle = min(max(middle, low + GRANULE), high - GRANULE)
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
