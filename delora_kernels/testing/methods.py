"""Every method and every convention of it. A new one is one entry here: tests, `check` and benchmarks then run it."""

from typing import Any

from torch import Tensor

from delora_kernels.testing import mixtures, reflections
from delora_kernels.testing.draw import Draw
from delora_kernels.testing.method import Method

ALPHA = 2.5
"""LoRA's alpha: the scale is ALPHA / r, for rsLoRA ALPHA / √r; not 1 for any rank, where it could be forgotten."""

DROPOUT_P = 0.2
"""1 / (1 − p) = 1.25 is exact in every float dtype, so the mask costs eager PyTorch no rounding."""

STACKED_P = (DROPOUT_P, 0.5)
"""Of two stacked adapters; as exact."""


def stacked_ranks(r: int) -> tuple[int, ...]:
    """Two unequal adapters of summed rank r, where r allows."""
    return (r - r // 3, r // 3) if r >= 3 else (1,) * r


def _lora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": ALPHA / draw.r}


def _lora_stacked(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return _lora(draw, base) | {"ranks": stacked_ranks(draw.r)}


def _rslora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return {"scale": ALPHA / draw.r**0.5}


def _dora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Magnitudes of both signs, away from the row norms where they start: c is neither 1 nor alike."""
    return _lora(draw, base) | {"magnitude": base["weight"].norm(dim=1) * (1 + draw.normal(draw.N))}


def _dora_branch(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    return _dora(draw, base) | {"dropout": "branch"}


def _delora(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's form, trained for a while: λ [1], n [K], the clamp far away."""
    return {"lam": 1 + 0.1 * draw.normal(1), "weight_norm": base["weight"].norm(dim=0)}


def _delora_zero_b(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """PEFT's start: B = 0, so that every norm of B is clamped."""
    return _delora(draw, base) | {"B": 0 * base["B"], "lam": _small_lam(draw)}


def _delora_clamped(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """The first row of A and the last column of B are shorter than the clamp; their gradients are far larger."""
    A, B = base["A"].clone(), base["B"].clone()
    A[0] *= 4e-5 / A[0].norm()
    B[:, -1] *= 4e-5 / B[:, -1].norm()
    return _delora(draw, base) | {"A": A, "B": B, "lam": _small_lam(draw)}


def _small_lam(draw: Draw) -> Tensor:
    """λ [1] with which the gradients of clamped factors, 10⁴ times as large as others, fit float16."""
    return 0.05 * (1 + 0.1 * draw.normal(1))


def _delora_frozen_live(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """The authors' code: a frozen start scaled by the live λ, no clamp. A trained pair is near its start."""
    (A0, B0), (A, B) = draw.factors(), (base["A"], base["B"])
    return _delora(draw, base) | {"frozen_A": A + 0.3 * A0, "frozen_B": B + 0.3 * B0, "eps": 0.0}


def _delora_frozen_paper(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """The paper: a frozen start scaled by its own λ₀, one number for the weight's norm; λ 0-d."""
    frozen_lam, norm = 1 + 0.1 * draw.normal(), base["weight"].norm() / draw.K**0.5
    scalars = {"lam": 1 + 0.1 * draw.normal(), "frozen_lam": frozen_lam, "weight_norm": norm}
    return _delora_frozen_live(draw, base) | scalars


_LORA = "lora_linear"
_DORA = "dora_linear"
_DELORA = "delora_linear"
_MOE = "moe_lora_linear"
_ETHER = "ether_linear"
_ETHER_PLUS = "ether_plus_linear"
_KEPT = ("dmagnitude",)
_TURNED = ("du", "dv", "du_out", "dv_out")
_SAVE_Y = {"saved": "output"}
_CONSTANTS = ("weight_norm", "frozen_A", "frozen_B", "frozen_lam")
_START = ("frozen_A", "frozen_B", "residual", "token_mask")

METHODS = {
    method.name: method
    for method in (
        Method("lora", _LORA, _lora),
        Method("lora-dropout", _LORA, _lora, dropout_p=DROPOUT_P),
        Method("lora-stacked-dropout", _LORA, _lora_stacked, dropout_p=STACKED_P),
        Method("rslora", _LORA, _rslora),
        Method("dora", _DORA, _dora, through_x=_KEPT),
        Method("dora-dropout", _DORA, _dora, dropout_p=DROPOUT_P, through_x=_KEPT),
        Method("dora-branch-dropout", _DORA, _dora_branch, dropout_p=DROPOUT_P, through_x=_KEPT),
        Method("dora-saved-output", _DORA, _dora, fused_only=_SAVE_Y, takes_bias=False, through_x=_KEPT),
        Method("delora", _DELORA, _delora, _CONSTANTS),
        Method("delora-dropout", _DELORA, _delora, _CONSTANTS, dropout_p=DROPOUT_P),
        Method("delora-zero-b", _DELORA, _delora_zero_b, _CONSTANTS),
        Method("delora-clamped", _DELORA, _delora_clamped, _CONSTANTS, vector_dims={"dA": 1, "dB": 0}),
        Method("delora-frozen-live", _DELORA, _delora_frozen_live, _CONSTANTS),
        Method("delora-frozen-paper", _DELORA, _delora_frozen_paper, _CONSTANTS),
        Method("moe", _MOE, mixtures.top_k),
        Method("moe-plain-dropout", _MOE, mixtures.top_k_plain, dropout_p=DROPOUT_P),
        Method("moe-shared-a", _MOE, mixtures.shared_a),
        Method("moe-gates", _MOE, mixtures.gates),
        Method("goat", _MOE, mixtures.goat, _START),
        Method("goat-dropout", _MOE, mixtures.goat, _START, dropout_p=DROPOUT_P, fused_only={"dropout": "independent"}),
        Method("ether", _ETHER, reflections.ether, through_x=_TURNED),
        Method("ether-both", _ETHER, reflections.ether_both, through_x=_TURNED),
        Method("ether-official", _ETHER, reflections.ether_official, through_x=_TURNED),
        Method("ether-plus", _ETHER_PLUS, reflections.ether_plus, through_x=_TURNED),
        Method("ether-plus-both", _ETHER_PLUS, reflections.ether_plus_both, through_x=_TURNED),
    )
}
"""Name → method, in the order `check` shows them."""
