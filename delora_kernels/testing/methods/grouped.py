"""Random linears of an expert model: experts with rows and without, and rows of no expert."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.lora import ALPHA, DROPOUT_P
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


def _dora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    made = experts(draw, base)
    return made | {"magnitude": made["weight"].norm(dim=2) * (1 + draw.normal(EXPERTS, draw.N))}


def _delora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    made = experts(draw, base)
    del made["scale"]
    return made | {"lam": 1 + draw.normal(EXPERTS).abs(), "weight_norm": made["weight"].norm(dim=1)}


_DORA: dict[str, Any] = {"constants": ("offsets",), "through_x": ("dmagnitude",)}
_DELORA = ("offsets", "weight_norm")

METHODS = (
    Method("grouped-lora", "grouped_lora_linear", experts, ("offsets",)),
    Method("grouped-lora-dropout", "grouped_lora_linear", experts, ("offsets",), dropout_p=DROPOUT_P),
    Method("grouped-dora", "grouped_dora_linear", _dora, **_DORA),
    Method("grouped-dora-dropout", "grouped_dora_linear", _dora, dropout_p=DROPOUT_P, **_DORA),
    Method("grouped-delora", "grouped_delora_linear", _delora, _DELORA),
    Method("grouped-delora-dropout", "grouped_delora_linear", _delora, _DELORA, dropout_p=DROPOUT_P),
)
