"""What is looked at while a run trains: each a function of the model, and when it is called.

A watch that is called at every step gives one number, of which the largest is kept; the others
give a JSON value at every mark of the run.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import delora_kernels as dk
from benchmarks.claims.rules import ROUNDING
from benchmarks.claims.task import TARGETS, Task
from benchmarks.memory import kept_bytes
from delora_kernels.nn import DeLoRALinear


class Seen(NamedTuple):
    """What a watch sees: the adapted model, the frozen one that it was made of, the task."""

    model: nn.Module
    frozen: nn.Module
    task: Task


class Watch(NamedTuple):
    """A function of what is seen, and whether it is called at every step."""

    look: Callable[[Seen], Any]
    every_step: bool = False


def layers(seen: Seen) -> dict[str, tuple[nn.Module, nn.Linear]]:
    """Return the adapted layers by their names in the frozen model, each beside its frozen one."""
    found = {name.removeprefix("base_model.model."): module for name, module in seen.model.named_modules()}
    return {
        name: (found[name], linear)
        for name, linear in seen.frozen.named_modules()
        if isinstance(linear, nn.Linear) and name.rpartition(".")[2] in TARGETS
    }


@torch.no_grad()
def delta(layer: nn.Module, linear: nn.Linear) -> Tensor:
    """Return ΔW `[N, K]`: what the layer does to an identity matrix, less what the frozen one does.

    Args:
        layer: adapted, additive or multiplicative, but not routed by tokens; or a trained linear.
        linear: the frozen one.
    """
    if type(layer) is nn.Linear:
        return layer.weight - linear.weight
    was = layer.training
    eye = torch.eye(linear.in_features)
    moved = layer.eval()(eye) - linear(eye)
    layer.train(was)
    return moved.T


def relative_norm(seen: Seen) -> float:
    """Return ‖ΔW‖_F / ‖W‖_F of all adapted layers together."""
    pairs = list(layers(seen).values())
    moved = sum(float(delta(layer, linear).square().sum()) for layer, linear in pairs)
    return float((moved / sum(float(linear.weight.square().sum()) for _, linear in pairs)) ** 0.5)


@torch.no_grad()
def bound(layer: Any) -> float:
    """Return a DeLoRA layer's bound of ‖ΔW‖_F: λ max n, with the paper's start (λ + λ₀) max n."""
    if isinstance(layer, DeLoRALinear):
        start = 0.0 if layer.frozen_lam is None else abs(float(layer.frozen_lam))
        return (abs(float(layer.lam)) + start) * float(layer.weight_norm.max())
    return abs(float(layer.delora_lambda["default"])) * float(layer.delora_w_norm["default"].max())


def part_of_bound(seen: Seen) -> float:
    """Return the largest ‖ΔW‖_F of an adapted layer, less what rounding may be of it, over its
    bound.
    """
    parts = [0.0]
    for layer, linear in layers(seen).values():
        beyond_rounding = float(delta(layer, linear).norm()) - ROUNDING * float(linear.weight.norm())
        limit = bound(layer)
        if not beyond_rounding <= 0:
            parts.append(beyond_rounding / limit if limit else math.inf)
    return math.inf if any(math.isnan(part) for part in parts) else max(parts)


def kept_kib(seen: Seen) -> float:
    """Return what a forward pass keeps for backward, parameters and buffers left out, in KiB."""
    batches = torch.Generator().manual_seed(0)
    but = [*seen.model.parameters(), *seen.model.buffers()]
    return kept_bytes(lambda: seen.task.loss(seen.model, batches), but) / 1024


def column_norms(seen: Seen) -> dict[str, float]:
    """Return the mean column norm of each layer's frozen weight: the mean of DeLoRA's n."""
    return {name: float(linear.weight.norm(dim=0).mean()) for name, (_, linear) in layers(seen).items()}


def changes(seen: Seen) -> dict[str, list[float]]:
    """Return ΔM, ΔD, ‖ΔW‖_F and ‖W‖_F of every adapted layer, by `dk.weight_changes`."""
    found = dk.weight_changes(seen.model, since=dict(seen.frozen.named_parameters()))
    wanted = [row for row in found.rows if row.name.rpartition(".")[2] in TARGETS]
    return {row.name: [row.magnitude, row.direction, row.update_norm, row.weight_norm] for row in wanted}


@torch.no_grad()
def experts(seen: Seen) -> dict[str, Any]:
    """Count what the routers do with the validation data: the mean balance of the layers, how many
    experts there are and are dead, each expert's share over all layers (1 is even), and how far
    any share of a single layer is from 1.
    """
    was = seen.model.training
    with dk.watch_experts(seen.model.eval()) as watch:
        seen.model(seen.task.parts["validation"].x)
    seen.model.train(was)
    report = watch.report()
    shares = torch.tensor([layer.share for layer in report.layers], dtype=torch.float64)
    return {
        "balance": report.summary()["router/balance"],
        "experts": shares.numel(),
        "dead": len(report.dead),
        "shares": shares.mean(0).tolist(),
        "farthest": float((shares - 1).abs().max()),
    }


WATCHES: dict[str, Watch] = {
    "column_norms": Watch(column_norms),
    "kept": Watch(kept_kib),
    "norms": Watch(relative_norm),
    "changes": Watch(changes),
    "experts": Watch(experts),
    "bound": Watch(part_of_bound, every_step=True),
}
