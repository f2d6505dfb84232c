"""Which whole models are measured: a Llama of random weights, sized to the device, for each method.

for case in model_cases("standard", methods=("lora", "dora"), device="cuda", half="bf16"):
"""

from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from benchmarks.cases import BOTH, PRECISIONS


@dataclass(frozen=True)
class ModelCase:
    """One model, method and way to train it.

    Args:
        method: Key of benchmarks.layer.methods.METHODS.
        name: Of the model whose sizes these are.
        hidden, intermediate, heads, kv_heads, vocabulary, blocks: Its sizes.
        batch, sequence: Tokens of a step.
        r: Rank.
        precision: Key of PRECISIONS.
        checkpointing: Whether blocks are computed again in the backward pass.
        limit_mib: For the longest sequence, above what is resident; None: not searched.
        compiled: Whether torch.compile's rival runs.
    """

    method: str
    name: str
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    blocks: int
    batch: int
    sequence: int
    r: int
    precision: str
    checkpointing: bool = False
    limit_mib: float | None = None
    compiled: bool = False

    @property
    def key(self) -> str:
        """What tells this case from every other, in words."""
        checkpointing = ", checkpointing" if self.checkpointing else ""
        return f"{self.method} {self.name} {self.blocks} blocks, {self.batch} × {self.sequence} tokens{checkpointing}"

    @property
    def work(self) -> float:
        """Multiply-adds of a step's linears, about."""
        block = 2 * self.hidden**2 + 3 * self.hidden * self.intermediate
        return 2.0 * self.batch * self.sequence * self.blocks * block

    def columns(self) -> dict[str, Any]:
        """Return the record's columns that say what was measured; K and N are those of the MLP."""
        narrow, wide, *_ = PRECISIONS[self.precision]
        sizes = {"T": self.batch * self.sequence, "K": self.hidden, "N": self.intermediate, "r": self.r, "E": None}
        dtypes = {"dtype": str(narrow).removeprefix("torch."), "adapter_dtype": str(wide).removeprefix("torch.")}
        facts = {"method": self.method, "shape": self.name, "precision": self.precision, "mode": BOTH, "dropout_p": 0.0}
        own = {name: asdict(self)[name] for name in ("blocks", "batch", "sequence", "checkpointing", "limit_mib")}
        return facts | sizes | dtypes | own


SMALL: dict[str, Any] = {"name": "Llama-shaped, SmolLM2's widths", "hidden": 576, "intermediate": 1536}
SMALL |= {
    "heads": 9,
    "kv_heads": 3,
    "vocabulary": 1024,
    "blocks": 2,
    "batch": 1,
    "sequence": 128,
    "r": 16,
    "limit_mib": 32,
}
LARGE: dict[str, Any] = {"name": "Llama-3-8B-shaped", "hidden": 4096, "intermediate": 14336, "heads": 32, "kv_heads": 8}
LARGE |= {"vocabulary": 32000, "blocks": 8, "batch": 1, "sequence": 4096, "r": 16, "limit_mib": 8192}


def model_cases(which: str, methods: tuple[str, ...], device: str, half: str) -> list[ModelCase]:
    """Return the whole models of a set, with and without checkpointing."""
    gpu = device.startswith("cuda")
    precision = half if half == "fp32" else f"{half}-autocast"
    sizes: dict[str, Any] = dict(LARGE if gpu else SMALL)
    if gpu and torch.cuda.get_device_properties(device).total_memory < 40 * 2**30:
        sizes |= {"blocks": 2, "sequence": 2048, "limit_mib": 4096}
    if which != "quick":
        sizes |= {"compiled": gpu}
    if which == "full" and gpu:
        sizes |= {"blocks": 32, "limit_mib": 16384}
    elif which != "quick" and not gpu:
        sizes |= {"blocks": 6, "sequence": 256, "limit_mib": 256}
    chosen = [
        ModelCase(method, precision=precision, checkpointing=checkpointing, **sizes)
        for method in methods
        for checkpointing in (False, True)
    ]
    chosen = [replace(case, compiled=case.compiled and (which == "full" or not case.checkpointing)) for case in chosen]
    return [case for case in chosen if which != "quick" or not case.checkpointing or case.method == methods[0]]
