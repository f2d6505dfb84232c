"""What accelerate() did to every adapter layer of a model, and why it left the rest alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

from delora_kernels.integrations.peft.verdict import State


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer.

    Args:
        name: Qualified module name.
        method: "lora", "dora", "delora", "expert lora" (of a module's parameter), "goat", "ether",
            "ether+", or the layer's class where the library does not know it.
        reason: Why not all of the layer runs fused as things stand, or None: it does.
        deferred: Whether only a call can tell; `reason` says why.
        state: "fused", "rank term fused" (beside the base layer's own forward) or "own forward".
    """

    name: str
    method: str
    reason: str | None
    deferred: bool = False
    state: State = State.FUSED

    @property
    def fused(self) -> bool:
        """Whether the layer runs fused."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """Every adapter layer of a model, fused or named with the reason; `str()` of it is the text for
    people.
    """

    layers: tuple[LayerReport, ...]
    _groups: Callable[[], tuple[tuple[str, ...], ...]] = field(default=tuple, repr=False, compare=False)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """Names of the layers that share an input and run as one call, group by group; known after
        the model's second forward pass, and what `accelerate(model, group=...)` takes.
        """
        return self._groups()

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """The layers that run fused."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def declined(self) -> tuple[LayerReport, ...]:
        """The layers of which not all runs fused, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.fused and not layer.deferred)

    @property
    def deferred(self) -> tuple[LayerReport, ...]:
        """The layers of which each call decides anew, with the reason."""
        return tuple(layer for layer in self.layers if layer.deferred)

    def __str__(self) -> str:
        methods = ", ".join(f"{count} {method}" for method, count in Counter(x.method for x in self.fused).items())
        lines = [f"fused {len(self.fused)} of {len(self.layers)} adapter layers" + (f" ({methods})" if methods else "")]
        beside = tuple(layer for layer in self.declined if layer.state == State.RANK_TERM)
        unfused = tuple(layer for layer in self.declined if layer.state != State.RANK_TERM)
        titles = {"not fused": unfused, "rank term alone fused": beside, "decided at each call": self.deferred}
        for title, layers in titles.items():
            for reason, count in Counter(layer.reason for layer in layers).most_common():
                names = [layer.name for layer in layers if layer.reason == reason]
                shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
                lines.append(f"  {title}, {count}: {reason}: {shown}")
        return "\n".join(lines)
