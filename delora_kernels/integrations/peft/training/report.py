"""training_report: every adapter tensor of a model with its gradient and its change, and what is
wrong.

It says nothing against what is right: B = 0 at the start (A's gradient is 0 then), a learning rate
of 0 in warm-up, accumulation, steps that a GradScaler leaves out, frozen factors, experts that no
token has chosen yet, tokens that no loss counts.
"""

import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from delora_kernels.integrations.peft.fused.experts import outermost
from delora_kernels.integrations.peft.training.packing import why_wrongly_packed
from delora_kernels.integrations.peft.training.watch import Watched, watch_of, watch_training


@dataclass(frozen=True)
class TensorReport:
    """One adapter tensor, or one expert's part of it.

    Args:
        name: Qualified name of the parameter.
        expert: Number of the expert; None: the tensor serves no expert of its own.
        tokens: Tokens whose gradients came back through its layer, of an expert: that chose it.
        gradient: The largest norm of its gradient so far; None: none came.
        change: How far it has moved since the watch began.
        steps: Optimiser steps that it took part in with a learning rate above 0.
        alarm: What is wrong, or None.
    """

    name: str
    expert: int | None
    tokens: int
    gradient: float | None
    change: float
    steps: int
    alarm: str | None = None


@dataclass(frozen=True)
class TrainingReport:
    """Whether the adapters of a model train; `str()` of it is the text for people.

    Args:
        tensors: Every adapter tensor that trains, by expert.
        model_alarms: What is wrong with layers: their factors' packing, a lost quantisation state.
        steps: Optimiser steps that ran with a learning rate above 0.
    """

    tensors: tuple[TensorReport, ...]
    model_alarms: tuple[str, ...]
    steps: int

    @property
    def alarms(self) -> tuple[str, ...]:
        """Everything that is wrong, in words; empty: nothing is."""
        found = [f"{_named(each)}: {each.alarm}" for each in self.tensors if each.alarm is not None]
        return (*self.model_alarms, *found)

    @property
    def without_tokens(self) -> tuple[TensorReport, ...]:
        """The tensors to which no token has come."""
        return tuple(each for each in self.tensors if each.tokens == 0)

    def __str__(self) -> str:
        moved = sum(each.change > 0 for each in self.tensors)
        lines = [f"{moved} of {len(self.tensors)} adapter tensors moved in {self.steps} steps"]
        if self.without_tokens:
            lines.append(f"  no token came to {len(self.without_tokens)} of them yet")
        lines += [f"  ALARM {alarm}" for alarm in self.model_alarms]
        for alarm, count in Counter(each.alarm for each in self.tensors if each.alarm is not None).most_common():
            names = [_named(each) for each in self.tensors if each.alarm == alarm]
            lines.append(f"  ALARM {count}: {alarm}: {', '.join(names[:3])}{', ...' if count > 3 else ''}")
        return "\n".join(lines)


def training_report(model: nn.Module) -> TrainingReport:
    """Say whether the adapters of a model train: after some steps under `watch_training`.

    Without a watch it reads the gradients that are there now, and judges what needs no watch.

    Args:
        model: The model that `watch_training` was given.

    Returns:
        The report; `report.alarms` is empty where nothing is wrong.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no PEFT adapter layer.
    """
    watch = watch_of(model)
    if watch is None:
        with watch_training(model) as watch:
            for tensor in watch.tensors():
                tensor.note(tensor.parameter)
    tensors = [row for tensor in watch.tensors() for row in _rows(tensor)]
    return TrainingReport(tuple(tensors), tuple(_of_layers(model)), watch.steps)


def _rows(tensor: Watched) -> Iterator[TensorReport]:
    """Judge a tensor, expert by expert."""
    layer, change = tensor.layer, tensor.change().tolist()
    E = len(change)
    gradient = None if tensor.gradient is None else tensor.gradient.tolist()
    stepped, tokens = tensor.stepped.tolist(), layer.tokens.tolist()
    partner = layer.with_partner[tensor.role].tolist() if tensor.role in layer.with_partner else None
    alone = tensor.without_partner().tolist()
    for e in range(E):
        came = tokens[e] if E > 1 else sum(tokens)
        alarm = None
        if gradient is None and came > 0:
            alarm = "it got no gradient, although tokens came"
        elif tensor.in_optimizer is False:
            alarm = "it is in no parameter group of the optimizer"
        elif alone[e]:
            alarm = "its partner factor is 0 and does not train: the adapter has no effect"
        elif not math.isfinite(change[e]):
            alarm = "it holds NaN or Inf"
        elif gradient is not None and partner is not None and gradient[e] == 0:
            meant = partner[e] if E > 1 else sum(partner)
            alarm = "its gradient is 0, although tokens came" if meant > 0 and layer.routed else None
        if alarm is None and tensor.steps > 0 and stepped[e] > 0 and change[e] == 0:
            alarm = "it has a gradient and was stepped, and has not moved"
        norm = None if gradient is None else gradient[e]
        yield TensorReport(tensor.name, e if E > 1 else None, came, norm, change[e], tensor.steps, alarm)


def _of_layers(model: nn.Module) -> Iterator[str]:
    """Yield what is wrong with layers as they stand."""
    layers: dict[Any, str] = {each: name for name, each in model.named_modules() if isinstance(each, BaseTunerLayer)}
    for outer in dict.fromkeys(outermost(layers).values()):
        reason = why_wrongly_packed(outer)
        if reason is not None:
            yield f"{layers[outer]}: {reason}"
    for layer, name in layers.items():
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        is_4bit = type(weight).__name__ == "Params4bit" and getattr(weight, "quant_state", None) is None
        if is_4bit and _is_packed(weight):
            yield f"{name}: its 4-bit base weight has lost its quantisation state; load the model again"


def _is_packed(weight: Any) -> bool:
    """Whether a weight holds packed numbers already: it is quantised on the way to its device."""
    return bool(getattr(weight, "bnb_quantized", False)) or not torch.is_floating_point(weight)


def _named(each: TensorReport) -> str:
    return each.name if each.expert is None else f"{each.name} of expert {each.expert}"
