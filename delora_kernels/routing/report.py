"""expert_report: how a model's routers use their experts, as a table and a heat map, and which
experts are dead.

A forward pass leaves its statistics in each layer with a router; `watch.py` adds up those of
several passes.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from delora_kernels import checks
from delora_kernels.functional.router_stats import RouterStats
from delora_kernels.nn.moe import Routed

DEAD = 0.01
"""An expert with less than this part of an even share is called dead."""


@dataclass(frozen=True)
class ExpertUse:
    """How one router used its experts.

    Args:
        name: Of the layer, with the adapter's after a colon where PEFT keeps several.
        fraction: f, for each expert the share of tokens that chose it.
        probability: P, the mean of the softmax over all experts.
        top_k: Experts a token chooses.
        tokens: How many tokens were counted; 0: not known, one pass.
    """

    name: str
    fraction: tuple[float, ...]
    probability: tuple[float, ...]
    top_k: int
    tokens: int = 0

    @property
    def share(self) -> tuple[float, ...]:
        """Each expert's part of the work, relative to an even one: f E / k; of a dense router
        P E.
        """
        E = len(self.fraction)
        dense = self.top_k == E
        return tuple(
            value * E / (1 if dense else self.top_k) for value in (self.probability if dense else self.fraction)
        )

    @property
    def tokens_per_expert(self) -> tuple[float, ...]:
        """How many of the counted tokens each expert got; of a dense router the sum of its
        probabilities.
        """
        dense = self.top_k == len(self.fraction)
        return tuple(self.tokens * value for value in (self.probability if dense else self.fraction))

    @property
    def dead(self) -> tuple[int, ...]:
        """The experts with less than 1 % of an even share."""
        return tuple(e for e, share in enumerate(self.share) if share < DEAD)

    @property
    def balance(self) -> float:
        """The balance loss in the paper's convention: 1 where all experts are used alike, at most E
        / k.
        """
        pairs = zip(self.fraction, self.probability, strict=True)
        return len(self.fraction) / self.top_k * sum(f * p for f, p in pairs)

    @property
    def entropy(self) -> float:
        """The entropy of the shares over its largest value ln E: 1 even, 0 one expert alone."""
        E = len(self.share)
        parts = [share / E for share in self.share if share > 0]
        return -sum(p * math.log(p) for p in parts) / math.log(E) if E > 1 else 1.0


@dataclass(frozen=True)
class ExpertReport:
    """The routers of a model; `str()` of it, or printing it, is the table."""

    layers: tuple[ExpertUse, ...]

    @property
    def dead(self) -> tuple[tuple[str, int], ...]:
        """Every dead expert: the layer's name, the expert's number."""
        return tuple((layer.name, e) for layer in self.layers for e in layer.dead)

    def summary(self) -> dict[str, float]:
        """Return the means over layers of balance and entropy, and the number of dead experts, by
        the names of logs.
        """
        n = len(self.layers)
        return {
            "router/balance": sum(layer.balance for layer in self.layers) / n,
            "router/entropy": sum(layer.entropy for layer in self.layers) / n,
            "router/dead_experts": float(len(self.dead)),
        }

    def by_layer(self) -> dict[str, float]:
        """Return what `summary` has, and the tokens of each expert, for every layer, by the names
        of logs.
        """
        found: dict[str, float] = {}
        for layer in self.layers:
            numbers = {"balance": layer.balance, "entropy": layer.entropy, "dead_experts": float(len(layer.dead))}
            numbers |= {f"tokens/{e}": tokens for e, tokens in enumerate(layer.tokens_per_expert)}
            found |= {f"router/{layer.name}/{name}": value for name, value in numbers.items()}
        return found

    def table(self) -> Any:
        """Return a `rich.table.Table`, one row a layer.

        Raises:
            ImportError: rich is not installed.
        """
        try:
            from rich.table import Table
        except ImportError as error:
            raise ImportError("the table of an expert report needs rich: pip install rich") from error
        prefix = _shared_prefix([layer.name for layer in self.layers])
        names = [layer.name.removeprefix(prefix) for layer in self.layers]
        table = Table(title=self.headline)
        width = min(40, max(map(len, names)))  # the shares give way to it: theirs is no loss when they are wrapped
        table.add_column(f"layer of {prefix[:-1]}" if prefix else "layer", min_width=width, overflow="fold")
        for column in ("balance", "entropy", "shares (1 = even)", "dead"):
            table.add_column(column, justify="left" if column.startswith("shares") else "right")
        for name, layer in zip(names, self.layers, strict=True):
            shares = " ".join(f"{share:.2f}" for share in layer.share)
            dead = ", ".join(map(str, layer.dead)) or "-"
            table.add_row(name, f"{layer.balance:.3f}", f"{layer.entropy:.3f}", shares, dead)
        return table

    def plot(self, path: str | Path | None = None) -> Any:
        """Return the heat map, layer × expert, of the shares; an even share is white, a dead expert
        is marked.

        Args:
            path: Where to save it; None: nowhere.

        Returns:
            The `matplotlib.figure.Figure`.

        Raises:
            ImportError: matplotlib is not installed.
        """
        try:
            from matplotlib.colors import TwoSlopeNorm
            from matplotlib.figure import Figure
        except ImportError as error:
            raise ImportError("the plot of an expert report needs matplotlib: pip install matplotlib") from error
        E = max(len(layer.share) for layer in self.layers)
        rows = [[*layer.share, *[math.nan] * (E - len(layer.share))] for layer in self.layers]
        figure = Figure(figsize=(4.0 + 0.4 * E, min(40.0, 1.5 + 0.16 * len(rows))), layout="constrained")
        axes = figure.subplots()
        top = max(2.0, *(max(layer.share) for layer in self.layers))
        image = axes.imshow(rows, aspect="auto", cmap="RdBu", norm=TwoSlopeNorm(1.0, 0.0, top))
        for row, layer in enumerate(self.layers):
            for e in layer.dead:
                axes.text(e, row, "×", ha="center", va="center", color="white", weight="bold")
        axes.set_xticks(range(E))
        axes.set_yticks(range(len(rows)), [layer.name for layer in self.layers], fontsize=6)
        axes.set_xlabel("expert")
        figure.colorbar(image, label="share of the tokens (1 = even; ×: dead)")
        figure.suptitle(self.headline, fontsize=9)
        if path is not None:
            figure.savefig(path, dpi=150)
        return figure

    @property
    def headline(self) -> str:
        """How many experts are dead, in one line."""
        count = sum(len(layer.share) for layer in self.layers)
        return f"{len(self.dead)} of {count} experts dead in {len(self.layers)} layers"

    def __str__(self) -> str:
        lines = [self.headline]
        for layer in self.layers:
            dead = f", dead: {', '.join(map(str, layer.dead))}" if layer.dead else ""
            shares = " ".join(f"{share:.2f}" for share in layer.share)
            lines.append(f"  {layer.name}: balance {layer.balance:.3f}, entropy {layer.entropy:.3f}, {shares}{dead}")
        return "\n".join(lines)


def _shared_prefix(names: list[str]) -> str:
    """Return the parts that all dotted names begin with, and the dot behind them; "" where a name
    would vanish.
    """
    shared = 0
    for parts in zip(*(name.split(".")[:-1] for name in names), strict=False):
        if len(set(parts)) > 1:
            break
        shared += 1
    return "".join(f"{part}." for part in names[0].split(".")[:shared])


def expert_report(model: nn.Module) -> ExpertReport:
    """Report how the routers of `model` used their experts in their last forward pass.

        print(dk.expert_report(model))                # 3 of 1680 experts dead in 210 layers ...
        rich.print(dk.expert_report(model).table())
        dk.expert_report(model).plot("experts.png")

    One batch is a small sample: `watch_experts` counts over many.

    Args:
        model: Any module with mixtures of `nn`, or with GOAT layers in PEFT.

    Raises:
        TypeError: `model` is no module.
        ValueError: no router of `model` has run yet, or it has none.
    """
    if not isinstance(model, nn.Module):
        remedy = "pass the model whose routers have run"
        raise checks.fail(TypeError, "expert_report", "model", "an nn.Module", type(model).__name__, remedy)
    return report_of([ExpertUse(name, *_numbers(stats), stats.top_k) for name, stats in _stats(model)])


def routed_layers(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers of `model` that have routers, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, Routed)]


def _stats(model: nn.Module) -> list[tuple[str, RouterStats]]:
    return [found for name, layer in routed_layers(model) for found in stats_of(name, layer)]


def stats_of(name: str, layer: Any) -> list[tuple[str, RouterStats]]:
    """Return the statistics of a layer's last pass; of PEFT's layers those of the active
    adapters.
    """
    if hasattr(layer, "router_stats"):
        if layer.disable_adapters or layer.merged:
            return []
        active = [key for key in layer.active_adapters if key in layer.router_stats]
        return [(name if len(active) == 1 else f"{name}:{key}", layer.router_stats[key]) for key in active]
    return [(name, layer.stats)] if layer.enabled and layer.stats is not None else []


def _numbers(stats: RouterStats) -> tuple[tuple[float, ...], tuple[float, ...]]:
    fraction, probability = torch.stack([stats.fraction, stats.probability]).double().tolist()
    return tuple(fraction), tuple(probability)


def report_of(uses: list[ExpertUse]) -> ExpertReport:
    """Return the report of them, or the error that there are none."""
    if not uses:
        remedy = "adapt it with GoatConfig or MoELoRALinear, and run a forward pass"
        raise checks.fail(ValueError, "expert_report", "model", "one whose routers have run", "none that has", remedy)
    return ExpertReport(tuple(uses))
