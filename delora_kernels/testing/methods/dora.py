"""DoRA: PEFT's dropout and that of the branch, y kept in place of a private tensor."""

from typing import Any

from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.lora import DROPOUT_P, lora
from delora_kernels.testing.methods.method import Method


def _dora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Magnitudes of both signs, away from the row norms where they start: c is neither 1 nor
    alike.
    """
    return lora(draw, base) | {"magnitude": base["weight"].norm(dim=1) * (1 + draw.normal(draw.N))}


def _dora_branch(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return _dora(draw, base) | {"dropout": "branch"}


_OPTIONS: dict[str, Any] = {"through_x": ("dmagnitude",)}

METHODS = (
    Method("dora", "dora_linear", _dora, **_OPTIONS),
    Method("dora-dropout", "dora_linear", _dora, dropout_p=DROPOUT_P, **_OPTIONS),
    Method("dora-branch-dropout", "dora_linear", _dora_branch, dropout_p=DROPOUT_P, **_OPTIONS),
    Method("dora-saved-output", "dora_linear", _dora, fused_only={"saved": "output"}, takes_bias=False, **_OPTIONS),
)
