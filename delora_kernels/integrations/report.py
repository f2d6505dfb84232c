"""What accelerate() did to every adapter layer of a model, and why it left the rest alone."""

from collections import Counter
from dataclasses import dataclass


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer.

    Args:
        name: Qualified module name.
        method: "lora", "dora", "delora", or the layer's class where the library does not know it.
        reason: Why the layer runs its own forward as things stand, or None: it is fused.
    """

    name: str
    method: str
    reason: str | None

    @property
    def fused(self) -> bool:
        """Whether the layer runs fused."""
        return self.reason is None


@dataclass(frozen=True)
class Report:
    """Every adapter layer of a model, fused or named with the reason; `str()` of it is the text for people."""

    layers: tuple[LayerReport, ...]

    @property
    def fused(self) -> tuple[LayerReport, ...]:
        """The layers that run fused."""
        return tuple(layer for layer in self.layers if layer.fused)

    @property
    def declined(self) -> tuple[LayerReport, ...]:
        """The layers that run their own forward, each with its reason."""
        return tuple(layer for layer in self.layers if not layer.fused)

    def __str__(self) -> str:
        methods = ", ".join(f"{count} {method}" for method, count in Counter(x.method for x in self.fused).items())
        lines = [f"fused {len(self.fused)} of {len(self.layers)} adapter layers" + (f" ({methods})" if methods else "")]
        for reason, count in Counter(layer.reason for layer in self.declined).most_common():
            names = [layer.name for layer in self.declined if layer.reason == reason]
            shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
            lines.append(f"  not fused, {count}: {reason}: {shown}")
        return "\n".join(lines)
