"""The rows of a record by the case they belong to, and what people call methods and machines."""

from collections.abc import Iterable
from typing import Any, NamedTuple

from benchmarks.cases import BOTH

Row = dict[str, Any]

NAMES = {"lora": "LoRA", "dora": "DoRA", "delora": "DeLoRA", "moe": "LoRA experts", "goat": "GOAT", "ether": "ETHER"}
NAMES |= {"ether-both": "ETHER, both sides", "ether-plus": "ETHER+", "ether-plus-both": "ETHER+, both sides"}


class Key(NamedTuple):
    """A case's own columns; None for those that its kind, or an older record, does not have."""

    method: str
    shape: str | None
    T: int
    K: int
    N: int
    r: int
    E: int | None
    k: int | None
    n_blocks: int | None
    precision: str
    dropout_p: float
    mode: str
    checkpointing: bool | None = None

    @property
    def family(self) -> str:
        """Methods that share sizes: "mixtures", "reflections", or "" of one rank."""
        return "mixtures" if self.E else "reflections" if self.n_blocks else ""

    @property
    def inner(self) -> str:
        """The rank, or what the method's family has beside it or in its place."""
        if self.n_blocks:
            return f"n={self.n_blocks}"
        return f"r={self.r}" + (f", E={self.E}, k={self.k}" if self.E else "")

    @property
    def sizes(self) -> str:
        """T, K → N, then the rank, or what a method has in its place."""
        return f"{self.T}, {self.K} → {self.N}, {self.inner.removeprefix('r=')}"

    @property
    def projection(self) -> str:
        """What a shape is called, and its features."""
        return f"{self.shape}\n{self.K} → {self.N}" if self.shape else f"{self.K} → {self.N}"

    @property
    def conditions(self) -> str:
        """Precision and dropout."""
        return str(self.precision) + (f", dropout {self.dropout_p:g}" if self.dropout_p else "")

    @property
    def backward(self) -> bool:
        """Whether the backward pass is measured."""
        return self.mode == BOTH


Impls = dict[str, Row]
Cases = dict[Key, Impls]


def by_case(rows: Iterable[Row], kind: str = "layer") -> Cases:
    """Case → implementation → row."""
    found: Cases = {}
    for row in rows:
        if row["kind"] == kind:
            found.setdefault(Key(*map(row.get, Key._fields)), {})[row["impl"]] = row  # type: ignore[arg-type]
    return found


def name_of(method: str) -> str:
    """Return a method's name as people write it."""
    return NAMES.get(method, method)


def peft_of(impls: Impls) -> Row | None:
    """PEFT's eager row of a case, whatever dtype its adapters have."""
    return next((row for name, row in impls.items() if name in ("peft", "peft-bf16", "peft-fp16")), None)


def device_of(machine: dict[str, Any]) -> str:
    """Return the device, and a CPU's threads."""
    if machine["device"] != "cpu":
        return str(machine["device"])
    return f"{machine['cpu']}, {machine['threads']} thread{'s' if machine['threads'] != 1 else ''}"


def condition(machine: dict[str, Any]) -> str:
    """Return the line under every figure: device, versions, commit."""
    versions = f"torch {machine['torch']}, PEFT {machine['peft']}, commit {machine['commit']}"
    return f"{device_of(machine)}, {versions}"
