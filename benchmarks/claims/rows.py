"""The methods of a study: each makes an adapted copy of a frozen model, by this library's fused
paths.

Those that are PEFT methods, PEFT's or ours, are put on by PEFT and accelerated; the rest are
modules of `delora_kernels.nn`, and the rungs of the ladder those of benchmarks/family.py. What is
not the learning rate is what the papers take: LoRA alpha = r (s = 1); rsLoRA s = alpha / √r;
DeLoRA λ = 4, the authors' value for their small tasks; GOAT four experts of which a token takes
two, the theoretical scale with η = 1, as for their vision transformer; the LoRA mixture the same
experts with zero B and s = 8, an alpha of twice the total rank over the rank of an expert.
"""

import copy
from collections.abc import Callable
from statistics import fmean
from typing import Any, NamedTuple

import peft
import torch
from torch import nn

import delora_kernels as dk
from benchmarks import family
from benchmarks.claims.task import TARGETS
from delora_kernels.nn import DeLoRALinear, EtherPlusLinear

LAMBDA = 4.0
EXPERTS, TAKEN = 4, 2
STANDARD = ("norms",)
BOUNDED = ("norms", "bound")


class Row(NamedTuple):
    """One method.

    Attributes:
        label: what tables and figures call it.
        make: of a copy of the frozen model and a rank, the adapted model; `fused` False leaves
            PEFT's own eager layers, for the study's cost.
        watch: what is looked at in every run of it (watches.py).
    """

    label: str
    make: Callable[[nn.Module, int, bool], nn.Module]
    watch: tuple[str, ...] = STANDARD


def adapted(row: str, model: nn.Module, rank: int, seed: int, fused: bool = True) -> nn.Module:
    """Return a copy of `model` with a method's adapters, started from the seed.

    Args:
        row: a name of `ROWS`.
        model: frozen; it stays as it is.
        rank: r; of all experts together.
        seed: draws the start.
        fused: False leaves PEFT's eager layers.
    """
    torch.manual_seed(seed)
    return ROWS[row].make(copy.deepcopy(model), rank, fused).train()


def _full(model: nn.Module, rank: int, fused: bool) -> nn.Module:
    return model.requires_grad_(True)


def by_peft(config: Callable[[int], peft.PeftConfig]) -> Callable[[nn.Module, int, bool], nn.Module]:
    """Make rows of PEFT methods: `config` of a rank says which; every layer must fuse."""

    def make(model: nn.Module, rank: int, fused: bool) -> nn.Module:
        made: Any = peft.get_peft_model(model, config(rank))
        report = dk.accelerate(made) if fused else None
        if report is not None and report.declined:
            raise RuntimeError(f"not all layers run fused: {report}")
        return made

    return make


def by_module(build: Callable[[nn.Linear, int], nn.Module]) -> Callable[[nn.Module, int, bool], nn.Module]:
    """Make rows of modules: `build` makes one of a frozen linear and a rank."""

    def make(model: nn.Module, rank: int, fused: bool) -> nn.Module:
        for parent in list(model.modules()):
            for name, child in list(parent.named_children()):
                if name in TARGETS and isinstance(child, nn.Linear):
                    setattr(parent, name, build(child, rank))
        return model

    return make


def lora(rank: int, **options: Any) -> peft.PeftConfig:
    """LoRA with alpha = r, or what `options` make of it."""
    return peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=list(TARGETS), **options)


def goat(rank: int, **options: Any) -> peft.PeftConfig:
    """GOAT, or the mixture that `options` make of it, of `EXPERTS` experts."""
    own = {"r": rank // EXPERTS, "num_experts": EXPERTS, "top_k": TAKEN, "alpha": 2.0 * rank}
    return dk.GoatConfig(**(own | options), target_modules=list(TARGETS))


def _delora(rank: int) -> peft.PeftConfig:
    return peft.DeloraConfig(r=rank, delora_lambda=LAMBDA, target_modules=list(TARGETS))  # type: ignore[arg-type]


def _paper_start(linear: nn.Linear, rank: int) -> nn.Module:
    return DeLoRALinear.from_linear(linear, r=rank, lam=LAMBDA, start="frozen_paper")


def _normalised(model: nn.Module, rank: int, fused: bool) -> nn.Module:
    """DeLoRA without its weight-norm scaling: n is one number for all columns of all layers, their
    mean.
    """
    made = by_module(lambda linear, r: DeLoRALinear.from_linear(linear, r=r, lam=LAMBDA))(model, rank, fused)
    layers = [layer for layer in made.modules() if isinstance(layer, DeLoRALinear)]
    mean = fmean(float(layer.weight_norm.mean()) for layer in layers)
    for layer in layers:
        layer.weight_norm.fill_(mean)
    return made


ROWS: dict[str, Row] = {
    "full": Row("full fine-tuning", _full),
    "lora": Row("LoRA", by_peft(lora)),
    "rslora": Row("rsLoRA", by_peft(lambda r: lora(r, use_rslora=True))),
    "dora": Row("DoRA", by_peft(lambda r: lora(r, use_dora=True))),
    "delora": Row("DeLoRA (PEFT's start)", by_peft(_delora), BOUNDED),
    "delora-paper": Row("DeLoRA (the paper's start)", by_module(_paper_start), BOUNDED),
    "ether": Row("ETHER", by_peft(lambda r: dk.EtherConfig(target_modules=list(TARGETS)))),
    "ether+": Row("ETHER+", by_peft(lambda r: dk.EtherPlusConfig(target_modules=list(TARGETS)))),
    "goat": Row("GOAT", by_peft(goat), ()),
    "mixture": Row("LoRA mixture", by_peft(lambda r: goat(r, init_weights="zero", scaling="alpha/r")), ()),
    # GOAT's scale without its start, and its start without its scale.
    "mixture-theory": Row("LoRA mixture, theoretical scale", by_peft(lambda r: goat(r, init_weights="zero")), ()),
    "goat-alpha": Row("GOAT with α/r", by_peft(lambda r: goat(r, scaling="alpha/r")), ()),
    # The rungs between LoRA and DeLoRA, and between ETHER+ on one side and DeLoRA.
    "normalised": Row("LoRA + normalisation", _normalised, BOUNDED),
    "ether+output": Row("ETHER+, one side", by_module(lambda w, r: EtherPlusLinear.from_linear(w, side="output"))),
    "scaled": Row("+ controllable scale", by_module(lambda w, r: family.Multiplicative(w, 1, relaxed=False))),
    "ranked": Row("+ rank", by_module(lambda w, r: family.Multiplicative(w, r // 2, relaxed=False))),
    "relaxed": Row("+ relaxed vectors", by_module(lambda w, r: family.Multiplicative(w, r // 2, relaxed=True))),
}
