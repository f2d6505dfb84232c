"""LoRALinear: a frozen linear plus a trainable product of two thin matrices."""

import math
from typing import Any

from typing_extensions import Unpack

from delora_kernels import checks, functional
from delora_kernels.nn.base import AdapterLinear, BaseOptions


class LoRALinear(AdapterLinear):
    """A frozen linear with a low-rank update.

        y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias,   s = alpha / r (rsLoRA: alpha / √r)

    A starts random (Kaiming uniform, a = √5), B at 0: y is exactly the frozen linear's. Merged: W'
    = W + s · B A.

    Args:
        in_features: K.
        out_features: N.
        r: Rank, ≥ 1.
        alpha: Numerator of the scale s.
        bias: Give the base a bias.
        rslora: s = alpha / √r.
        dropout_p: Probability of dropping an element of the adapter's input, in [0, 1); only in
            training mode.
        adapter_dtype: Dtype of A and B. None: float32 for a float16 or bfloat16 base, else the
            base's (as PEFT).
        device: Device of every tensor.
        dtype: Dtype of the base, which is initialised as nn.Linear's and frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685),
    section 4.1; rsLoRA: Kalajdzievski (arXiv:2312.03732).
    """

    _function = functional.lora_linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8.0,
        *,
        rslora: bool = False,
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, r, **base)
        self.alpha, self.rslora = alpha, rslora
        self.scale = lora_scale(type(self).__name__, alpha, r, rslora)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, alpha={self.alpha}, rslora={self.rslora}"

    def _arguments(self) -> dict[str, Any]:
        return {"scale": self.scale}


def lora_scale(kind: str, alpha: float, r: int, rslora: bool) -> float:
    """s: alpha / r, or alpha / √r for rsLoRA."""
    return checks.number(kind, "alpha", alpha) / (math.sqrt(r) if rslora else r)
