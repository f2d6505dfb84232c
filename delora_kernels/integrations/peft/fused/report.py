"""What accelerate() did to every adapter layer of a model, and why it left the rest alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from delora_kernels.diagnostics import versions
from delora_kernels.diagnostics.environment import unavailable_backends
from delora_kernels.diagnostics.proof import Proof
from delora_kernels.diagnostics.reasons import code_of
from delora_kernels.integrations.peft.verdict import State
from delora_kernels.version import __version__

SCHEMA = 1
"""Of `Report.to_dict`: it grows where a key changes its meaning or goes; new keys leave it."""


@dataclass(frozen=True)
class LayerReport:
    """One adapter layer.

    Args:
        name: Qualified module name.
        method: "lora", "dora", "delora", "expert lora" (of a module's parameter), "goat", "ether",
            "ether+", or the layer's class where the library does not know it.
        reason: Why not all of the layer runs fused as things stand, or None: it does.
        deferred: Whether only a call can tell; `reason` says why.
        state: "fused", "rank term fused" (beside the base layer's own forward), "own forward", or
            before a model is loaded "expected" (to be fused).
        backend: The backend that takes its calls, as far as that is known before one; None: it is
            not, or PEFT's own forward runs.
    """

    name: str
    method: str
    reason: str | None
    deferred: bool = False
    state: State = State.FUSED
    backend: str | None = None

    @property
    def fused(self) -> bool:
        """Whether the layer runs fused."""
        return self.reason is None

    @property
    def code(self) -> str | None:
        """The reason's code, one of docs/reasons.md; None: there is no reason."""
        return None if self.reason is None else code_of(self.reason)


@dataclass(frozen=True)
class Report:
    """Every adapter layer of a model, fused or named with the reason; `str()` of it is the text for
    people, `to_dict()` for programs.

    Args:
        layers: One for each adapter layer.
        proofs: What was found when the kernels that the layers call proved themselves; empty where
            there were none to prove, as on a CPU.
        before_loading: Whether this is what accelerate() would do, told by can_accelerate().
    """

    layers: tuple[LayerReport, ...]
    _groups: Callable[[], tuple[tuple[str, ...], ...]] = field(default=tuple, repr=False, compare=False)
    proofs: tuple[Proof, ...] = field(default=(), compare=False)
    before_loading: bool = False

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

    @property
    def backend(self) -> str | None:
        """The backend that takes the calls of most layers; None where that is not known."""
        counts = self._backends()
        return counts.most_common(1)[0][0] if counts else None

    def to_dict(self) -> dict[str, Any]:
        """Return all of it in JSON's types.

        Returns:
            `schema`, a number; `versions` and `backends` of this machine (name → None if it can
            run, else its reason and code); `backend`; `before_loading`; `layers`, each {`name`,
            `method`, `state`, `fused`, `deferred`, `backend`, `code`, `reason`}; `groups`, lists of
            names; `proofs`, each {`backend`, `function`, `dtypes`, `device`, `seconds`, `code`,
            `reason`}; `totals`, numbers of layers.
        """
        return {
            "schema": SCHEMA,
            "versions": {"delora_kernels": __version__, **{name: versions.installed(name) for name in versions.TABLE}},
            "backends": {name: _with_code(reason) for name, reason in unavailable_backends().items()},
            "backend": self.backend,
            "before_loading": self.before_loading,
            "layers": [_layer_to_dict(layer) for layer in self.layers],
            "groups": [list(group) for group in self.groups],
            "proofs": [proof._asdict() | {"code": _code(proof.reason)} for proof in self.proofs],
            "totals": {
                "layers": len(self.layers),
                "fused": len(self.fused),
                "declined": len(self.declined),
                "deferred": len(self.deferred),
                "expected": sum(layer.state == State.EXPECTED for layer in self.layers),
                "rank_term": sum(layer.state == State.RANK_TERM for layer in self.layers),
            },
        }

    def _backends(self) -> Counter[str]:
        return Counter(layer.backend for layer in self.layers if layer.backend is not None)

    def _first_line(self) -> str:
        methods = ", ".join(f"{count} {method}" for method, count in Counter(x.method for x in self.fused).items())
        verb = "would fuse" if self.before_loading else "fused"
        line = f"{verb} {len(self.fused)} of {len(self.layers)} adapter layers" + (f" ({methods})" if methods else "")
        expected = sum(layer.state == State.EXPECTED for layer in self.layers)
        line += f", and {expected} more are expected" if expected else ""
        counts = self._backends()
        if len(counts) > 1:
            named = ", ".join(f"{name} ({count})" for name, count in counts.most_common())
            return f"{line} on the backends {named}"
        return line + "".join(f" on the {name} backend" for name in counts)

    def __str__(self) -> str:
        lines = [self._first_line()]
        beside = tuple(layer for layer in self.declined if layer.state == State.RANK_TERM)
        unfused = tuple(layer for layer in self.declined if layer.state != State.RANK_TERM)
        expected = tuple(layer for layer in self.deferred if layer.state == State.EXPECTED)
        later = tuple(layer for layer in self.deferred if layer.state != State.EXPECTED)
        titles = {"not fused": unfused, "rank term alone fused": beside}
        titles |= {"expected to be fused": expected, "decided at each call": later}
        for title, layers in titles.items():
            for reason, count in Counter(layer.reason for layer in layers).most_common():
                names = [layer.name for layer in layers if layer.reason == reason]
                shown = ", ".join(names[:3]) + (", ..." if count > 3 else "")
                lines.append(f"  {title}, {count}: {reason}: {shown}")
        kinds = Counter(" + ".join(name.rpartition(".")[2] for name in group) for group in self.groups)
        if kinds:
            shown = ", ".join(f"{kind} ({count})" for kind, count in kinds.most_common())
            lines.append(f"  share an input, and run as one call: {shown}")
        lines += [f"  not used: {proof}" for proof in self.proofs if proof.reason is not None]
        right = [proof for proof in self.proofs if proof.reason is None]
        if right:
            seconds = sum(proof.seconds for proof in self.proofs)
            lines.append(f"  kernels proved right before their first call: {len(right)} kinds, in {seconds:.1f} s")
        return "\n".join(lines)


def _code(reason: str | None) -> str | None:
    return None if reason is None else code_of(reason)


def _with_code(reason: str | None) -> dict[str, str | None] | None:
    return None if reason is None else {"code": _code(reason), "reason": reason}


def _layer_to_dict(layer: LayerReport) -> dict[str, Any]:
    found = {name: getattr(layer, name) for name in ("name", "method", "fused", "deferred", "backend", "code")}
    reason = None if layer.reason is None else str(layer.reason)  # a subclass of str is no JSON type to everyone
    return found | {"state": layer.state.value, "reason": reason}
