"""DeLoRA: trained for a while, at PEFT's start, with clamped norms, with a frozen start."""

from typing import Any

from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.lora import DROPOUT_P
from delora_kernels.testing.methods.method import Method


def _delora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's form, trained for a while: λ [1], n [K], the clamp far away."""
    return {"lam": 1 + 0.1 * draw.normal(1), "weight_norm": base["weight"].norm(dim=0)}


def _delora_zero_b(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's start: B = 0, so that every norm of B is clamped."""
    return _delora(draw, base) | {"B": 0 * base["B"], "lam": _small_lam(draw)}


def _delora_clamped(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw factors of which the first row of A and the last column of B are shorter than the
    clamp; their gradients are far larger.
    """
    A, B = base["A"].clone(), base["B"].clone()
    A[0] *= 4e-5 / A[0].norm()
    B[:, -1] *= 4e-5 / B[:, -1].norm()
    return _delora(draw, base) | {"A": A, "B": B, "lam": _small_lam(draw)}


def _small_lam(draw: Draw) -> Tensor:
    """λ [1] with which the gradients of clamped factors, 10⁴ times as large as others, fit
    float16.
    """
    return 0.05 * (1 + 0.1 * draw.normal(1))


def _delora_frozen_live(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw for the authors' code: a frozen start scaled by the live λ, no clamp. A trained pair is
    near its start.
    """
    (A0, B0), (A, B) = draw.factors(), (base["A"], base["B"])
    return _delora(draw, base) | {"frozen_A": A + 0.3 * A0, "frozen_B": B + 0.3 * B0, "eps": 0.0}


def _delora_frozen_paper(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw for the paper: a frozen start scaled by its own λ₀, one number for the weight's norm; λ
    0-d.
    """
    frozen_lam, norm = 1 + 0.1 * draw.normal(), base["weight"].norm() / draw.K**0.5
    scalars = {"lam": 1 + 0.1 * draw.normal(), "frozen_lam": frozen_lam, "weight_norm": norm}
    return _delora_frozen_live(draw, base) | scalars


_CONSTANTS = ("weight_norm", "frozen_A", "frozen_B", "frozen_lam")

METHODS = (
    Method("delora", "delora_linear", _delora, _CONSTANTS),
    Method("delora-dropout", "delora_linear", _delora, _CONSTANTS, dropout_p=DROPOUT_P),
    Method("delora-zero-b", "delora_linear", _delora_zero_b, _CONSTANTS),
    Method("delora-clamped", "delora_linear", _delora_clamped, _CONSTANTS, vector_dims={"dA": 1, "dB": 0}),
    Method("delora-frozen-live", "delora_linear", _delora_frozen_live, _CONSTANTS),
    Method("delora-frozen-paper", "delora_linear", _delora_frozen_paper, _CONSTANTS),
)
