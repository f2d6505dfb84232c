"""watch_training: counts, while a model trains, what its adapters get: tokens, gradients, steps.

A token counts for an adapter where a gradient comes back to it through its layer, and for an expert
where that token chose it; so padding, and what a loss leaves out, do not count.
"""

import weakref
from collections.abc import Iterable
from contextlib import ExitStack
from typing import Any

import torch
from peft.tuners.lora.layer import LoraLayer, ParamWrapper
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from delora_kernels.bases.plain import why_not_local
from delora_kernels.integrations.peft.fused.experts import outermost, routing_of, wrappers_of

_watches: "weakref.WeakKeyDictionary[nn.Module, TrainingWatch]" = weakref.WeakKeyDictionary()


class Watched:
    """One adapter tensor.

    Args:
        name: Qualified name.
        parameter: The tensor.
        role: "A", "B", or the name of where PEFT keeps it.
        layer: What is counted of its layer.
        partner: The other factor of its pair, where it is one of a pair.
    """

    def __init__(
        self, name: str, parameter: nn.Parameter, role: str, layer: "WatchedLayer", partner: nn.Parameter | None
    ) -> None:
        self.name, self.parameter, self.role, self.layer, self.partner = name, parameter, role, layer, partner
        self.start = parameter.detach().clone()
        self.gradient: Tensor | None = None  # the largest norm so far, by expert; None: none came
        self.stepped = self.by_expert(torch.zeros_like(parameter))
        self.steps = 0
        self.in_optimizer: bool | None = None

    def by_expert(self, tensor: Tensor) -> Tensor:
        """Return the norm of each expert's part, [E]; of a dense layer there is one."""
        return _by_expert(tensor, self.role, self.layer.experts)

    def note(self, parameter: Tensor) -> None:
        """Take note of a gradient that has come."""
        if parameter.grad is not None:
            norms = self.by_expert(parameter.grad)
            self.gradient = norms if self.gradient is None else torch.maximum(self.gradient, norms)

    def took_step(self, rate: float, is_sgd: bool) -> None:
        """Take note of a step at a learning rate above 0. SGD's, and any of a float32 parameter,
        may be below what its dtype can tell apart; such a step moves nothing, and rightly. In 16
        bits one that moves nothing is a fault of the run.
        """
        self.steps += 1
        if self.parameter.grad is not None:
            seen, value = self.parameter.grad, self.parameter.detach()
            if is_sgd or value.dtype == torch.float32:
                step = rate * seen.abs() if is_sgd else rate  # adaptive ones are of the rate's size
                seen = seen * (step > torch.finfo(value.dtype).eps * value.abs())
            self.stepped = torch.maximum(self.stepped, self.by_expert(seen))

    def change(self) -> Tensor:
        """How far it has moved, [E]."""
        return self.by_expert(self.parameter.detach() - self.start.to(self.parameter.device))

    def without_partner(self) -> Tensor:
        """Whether each expert's partner factor is 0 and stays so, [E]."""
        if self.partner is None or self.partner.requires_grad:
            return torch.zeros(self.layer.experts, dtype=torch.bool)
        return _by_expert(self.partner, "A" if self.role == "B" else "B", self.layer.experts) == 0


class WatchedLayer:
    """What is counted of one adapter layer.

    Args:
        layer: The layer.
        experts: E, or 1.
    """

    def __init__(self, layer: Any, experts: int) -> None:
        self.layer, self.experts, self.tensors = layer, experts, list[Watched]()
        self.tokens = torch.zeros(experts, dtype=torch.int64)
        self.with_partner = {role: torch.zeros(experts, dtype=torch.int64) for role in "AB"}
        self.routed = True

    def count(self, counts: Tensor) -> None:
        """Count tokens [E] whose gradients came back; whose partner factor is not 0, apart."""
        counts = counts.cpu()
        self.tokens += counts
        between = getattr(self.layer, "lora_E", {})  # AdaLoRA's, 0 at the start
        for role, partner in (("A", "B"), ("B", "A")):
            owners = getattr(self.layer, f"lora_{partner}", {})
            for name in self.layer.active_adapters:
                if name in owners:
                    there = _by_expert(getattr(owners[name], "weight", owners[name]), partner, self.experts) != 0
                    if name in between:
                        there = there & (between[name] != 0).any()
                    self.with_partner[role] += counts * there.cpu()


class TrainingWatch:
    """Counts while it is open: `with dk.watch_training(model, optimizer): ...`, or until `close()`.

    Attributes:
        steps: Optimiser steps so far that ran with a learning rate above 0.
    """

    def __init__(self, model: nn.Module, optimizer: Any) -> None:
        self.layers: list[WatchedLayer] = []
        self.steps = 0
        self.optimizer = optimizer = _stepping(optimizer)
        self._hooks = ExitStack()
        layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
        outer_of = outermost(layers)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        watched: dict[Any, WatchedLayer] = {}
        for layer in layers:
            watched[layer] = WatchedLayer(layer, getattr(layer, "num_experts", 1) or 1)
            self.layers.append(watched[layer])
            for role, parameter, partner in trained(layer):
                tensor = Watched(names.get(id(parameter), role), parameter, role, watched[layer], partner)
                watched[layer].tensors.append(tensor)
                self._on(parameter.register_post_accumulate_grad_hook(tensor.note))
        for layer in layers:
            if outer_of.get(layer, layer) is layer:
                group = [watched[each] for each in wrappers_of(layer)[0]] if layer in outer_of else [watched[layer]]
                self._on(layer.register_forward_hook(_counter(group), with_kwargs=True))
        if optimizer is not None:
            inside = {id(p): group for group in optimizer.param_groups for p in group["params"]}
            for tensor in self.tensors():
                tensor.in_optimizer = id(tensor.parameter) in inside
            self._on(optimizer.register_step_post_hook(self._stepped))

    def tensors(self) -> Iterable[Watched]:
        """Every adapter tensor that trains."""
        return (tensor for layer in self.layers for tensor in layer.tensors)

    def _on(self, handle: Any) -> None:
        self._hooks.callback(handle.remove)

    def _stepped(self, optimizer: Any, args: Any, kwargs: Any) -> None:
        """Take note of a step that ran: of every tensor whose learning rate was above 0."""
        # Adafactor sets its own rates where it has None
        rates = {
            id(p): 1.0 if group["lr"] is None else float(group["lr"])
            for group in optimizer.param_groups
            for p in group["params"]
        }
        self.steps += any(rate > 0 for rate in rates.values())
        for tensor in self.tensors():
            rate = rates.get(id(tensor.parameter), 0.0)
            if rate > 0:
                tensor.took_step(rate, isinstance(optimizer, torch.optim.SGD))

    def close(self) -> None:
        """Stop counting; what was counted stays."""
        self._hooks.close()

    def __enter__(self) -> "TrainingWatch":
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def watch_training(model: nn.Module, optimizer: Any = None) -> TrainingWatch:
    """Count what the adapters of a model get while it trains, for `training_report`.

    Args:
        model: Any module with PEFT adapter layers.
        optimizer: What trains them, or Hugging Face accelerate's wrapper of it; None: their changes
            are shown, and not judged.

    Returns:
        The watch: a context manager that stops counting at its end, or call `close()`.

    Raises:
        TypeError: `model` is not a module.
        ValueError: `model` has no PEFT adapter layer.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"watch_training: model must be a torch.nn.Module, got {type(model).__name__}; pass the model")
    if not any(isinstance(module, BaseTunerLayer) for module in model.modules()):
        raise ValueError(
            f"watch_training: model must hold PEFT adapter layers, got a {type(model).__name__} without any; "
            "wrap it with peft.get_peft_model first"
        )
    if model in _watches:
        _watches[model].close()
    _watches[model] = TrainingWatch(model, optimizer)
    return _watches[model]


def watch_of(model: nn.Module) -> TrainingWatch | None:
    """Return the last watch of a model, open or closed."""
    return _watches.get(model)


def trained(layer: Any) -> Iterable[tuple[str, nn.Parameter, nn.Parameter | None]]:
    """Return the tensors of a layer's adapters that require a gradient, with their roles and the
    other factors of their pairs. Shards are left out: what came to the whole, nobody here sees.
    """
    for container in layer.adapter_layer_names:
        held = getattr(layer, container, None)
        if isinstance(held, nn.Module):
            role = container.removeprefix("lora_") if isinstance(layer, LoraLayer) else container
            others = getattr(layer, {"A": "lora_B", "B": "lora_A"}.get(role, ""), {})
            for name, parameter in held.named_parameters():
                if parameter.requires_grad and why_not_local(parameter, role) is None:
                    adapter = name.partition(".")[0]
                    partner = getattr(others[adapter], "weight", None) if adapter in others else None
                    yield role, parameter, partner


def _stepping(optimizer: Any) -> Any:
    """Return the optimizer of torch's that really steps inside Hugging Face accelerate's wrapper;
    None where another engine does.
    """
    if type(optimizer).__module__.startswith("accelerate."):
        optimizer = optimizer.optimizer
    return optimizer if hasattr(optimizer, "register_step_post_hook") else None


def _by_expert(tensor: Tensor, role: str, E: int) -> Tensor:
    """Return the norm of each expert's part of a tensor as PEFT packs it, [E]."""
    parts = tensor.detach().float()
    if E == 1 or role not in ("A", "B"):
        return parts.norm()[None]
    return parts.view(E, -1).norm(dim=1) if role == "A" else parts.reshape(-1, E).norm(dim=0)


def _counter(group: list[WatchedLayer]) -> Any:
    """Make the forward hook of a layer, or of the outermost wrapper of several."""

    def count(layer: Any, args: Any, kwargs: Any, y: Any) -> None:
        if not isinstance(y, Tensor) or not y.requires_grad or not torch.is_grad_enabled():
            return
        E = group[0].experts
        routing = None
        if E > 1:
            found = routing_of(wrappers_of(layer)[1], args[1:], kwargs) if isinstance(layer, ParamWrapper) else "none"
            routing = None if isinstance(found, str) else (found[0].detach(), found[1].detach() != 0)

        def came_back(dy: Tensor) -> None:
            rows = (dy.detach() != 0).flatten(0, -2).any(1) if dy.dim() > 1 else (dy != 0).any()[None]
            if routing is None:
                counts = torch.full((E,), int(rows.sum()), dtype=torch.int64)
            else:
                chosen = routing[0][rows[:, None] & routing[1]]
                counts = torch.bincount(chosen[chosen < E], minlength=E)
            for each in group:
                each.routed = E == 1 or routing is not None
                each.count(counts)

        y.register_hook(came_back)

    return torch.compiler.disable(count)
