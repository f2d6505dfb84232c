"""watch_experts: what a model's routers do over several forward passes, added up."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels.functional.router_stats import RouterStats
from delora_kernels.routing.report import ExpertReport, ExpertUse, report_of, routed_layers, stats_of


class ExpertWatch:
    """The sums of what routers did; `report()` at any time, `reset()` to begin again."""

    def __init__(self) -> None:
        self._sums: dict[str, Tensor] = {}
        self._top_k: dict[str, int] = {}

    def add(self, name: str, stats: RouterStats, tokens: int | Tensor) -> None:
        """Count one pass of one router over `tokens` tokens."""
        sums = torch.stack([stats.fraction, stats.probability, torch.ones_like(stats.fraction)]).double() * tokens
        self._sums[name] = sums + self._sums[name] if name in self._sums else sums
        self._top_k[name] = stats.top_k

    def reset(self) -> None:
        """Forget what was counted."""
        self._sums.clear()

    @property
    def counted(self) -> bool:
        """Whether anything was."""
        return bool(self._sums)

    def report(self) -> ExpertReport:
        """Return what was counted since the beginning, or the last `reset`.

        Raises:
            ValueError: nothing was.
        """
        uses = []
        for name, sums in self._sums.items():
            means = sums / sums[2].clamp(min=1)
            fraction, probability = (tuple(values) for values in means[:2].tolist())
            uses.append(ExpertUse(name, fraction, probability, self._top_k[name], int(sums[2, 0])))
        return report_of(uses)


@contextmanager
def watch_experts(model: nn.Module, training: bool | None = None) -> Iterator[ExpertWatch]:
    """Count what the routers of `model` do in every forward pass of the block.

        with dk.watch_experts(model) as watch:
            evaluate(model)
        print(watch.report())

    The tokens that a layer's losses count are counted, all of them where it has no mask. A
    recomputed pass (checkpointing) counts again, which leaves the shares alone.

    Args:
        model: Any module with mixtures of `nn`, or with GOAT layers in PEFT.
        training: Count only passes in training mode, or only those in evaluation mode; None: all.
    """
    watch = ExpertWatch()

    def counter(layer_name: str) -> Any:
        def count(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor) -> None:
            if training is None or layer.training is training:
                mask = layer.counted_tokens(*args, **kwargs)
                tokens = output.shape[:-1].numel() if mask is None else mask.sum()
                for name, stats in stats_of(layer_name, layer):
                    watch.add(name, stats, tokens)

        return count

    hooks = [layer.register_forward_hook(counter(name), with_kwargs=True) for name, layer in routed_layers(model)]
    try:
        yield watch
    finally:
        for hook in hooks:
            hook.remove()
