"""LoRA: plain, rank-stabilised, several adapters stacked."""

from typing import Any

from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.method import Method

ALPHA = 2.5
"""LoRA's alpha: the scale is ALPHA / r, for rsLoRA ALPHA / √r; not 1 for any rank, where it could
be forgotten.
"""

DROPOUT_P = 0.2
"""1 / (1 − p) = 1.25 is exact in every float dtype, so the mask costs eager PyTorch no rounding."""

STACKED_P = (DROPOUT_P, 0.5)
"""Of two stacked adapters; as exact."""


def stacked_ranks(r: int) -> tuple[int, ...]:
    """Two unequal adapters of summed rank r, where r allows."""
    return (r - r // 3, r // 3) if r >= 3 else (1,) * r


def lora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw what LoRA has beside A and B."""
    return {"scale": ALPHA / draw.r}


def _lora_stacked(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return lora(draw, base) | {"ranks": stacked_ranks(draw.r)}


def _rslora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": ALPHA / draw.r**0.5}


METHODS = (
    Method("lora", "lora_linear", lora),
    Method("lora-dropout", "lora_linear", lora, dropout_p=DROPOUT_P),
    Method("lora-stacked-dropout", "lora_linear", _lora_stacked, dropout_p=STACKED_P),
    Method("rslora", "lora_linear", _rslora),
)
