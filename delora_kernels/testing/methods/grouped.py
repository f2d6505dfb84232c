"""Random linears of an expert model: experts with rows and without, and rows of no expert."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.lora import ALPHA
from delora_kernels.testing.methods.method import Method

EXPERTS = 4


def offsets_of(T: int, E: int = EXPERTS) -> Tensor:
    """[E], int64: the second expert has no rows, the last row of four or more belongs to nobody."""
    ends = [T * (e + 1) // E for e in range(E)]
    ends[1:2] = ends[:1]
    ends[-1] -= 1 if T >= E else 0
    return torch.tensor(ends)


def experts(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw a weight and a pair of factors for each expert, as large as a plain adapter's."""
    E, r, K, N = EXPERTS, draw.r, draw.K, draw.N
    made: dict[str, Any] = {name: draw.normal(E, *size) / K**0.5 for name, size in _sizes(r, K, N).items()}
    if "bias" in base:
        made["bias"] = draw.normal(E, N)
    return made | {"offsets": offsets_of(draw.T), "scale": ALPHA / r}


def _sizes(r: int, K: int, N: int) -> dict[str, tuple[int, int]]:
    return {"weight": (N, K), "A": (r, K), "B": (N, r)}


METHODS = (Method("grouped-lora", "grouped_lora_linear", experts, ("offsets",)),)
