"""LoRALinear: a frozen linear plus a trainable product of two thin matrices."""

import math

import torch
from torch import Tensor, nn
from typing_extensions import Self

from delora_kernels import checks, functional
from delora_kernels.nn.base import AdapterLinear


class LoRALinear(AdapterLinear):
    """A frozen linear with a low-rank update.

        y = x Wᵀ + s · drop(x) Aᵀ Bᵀ + bias,   s = alpha / r (rsLoRA: alpha / √r)

    A starts random (Kaiming uniform, a = √5), B at 0: y is exactly the frozen linear's. Merged: W' = W + s · B A.

    Args:
        in_features: K.
        out_features: N.
        r: Rank, ≥ 1.
        alpha: Numerator of the scale s.
        bias: Give the base a bias.
        rslora: s = alpha / √r.
        dropout_p: Probability of dropping an element of the adapter's input, in [0, 1); only in training mode.
        adapter_dtype: Dtype of A and B. None: float32 for a float16 or bfloat16 base, else the base's (as PEFT).
        device: Device of every tensor.
        dtype: Dtype of the base, which is initialised as nn.Linear's and frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Hu et al., "LoRA: Low-Rank Adaptation of Large Language Models" (arXiv:2106.09685), section 4.1;
    rsLoRA: Kalajdzievski (arXiv:2312.03732).
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8.0,
        *,
        bias: bool = True,
        rslora: bool = False,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            r,
            bias=bias,
            dropout_p=dropout_p,
            adapter_dtype=adapter_dtype,
            device=device,
            dtype=dtype,
        )
        self.alpha, self.rslora = alpha, rslora
        self.scale = lora_scale(type(self).__name__, alpha, r, rslora)
        self.reset_parameters()

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        r: int = 8,
        alpha: float = 8.0,
        *,
        rslora: bool = False,
        dropout_p: float = 0.0,
        adapter_dtype: torch.dtype | None = None,
    ) -> Self:
        """A LoRALinear on the weight and bias of `linear`: the same tensors, frozen.

        Neither training nor merging writes to them; load_state_dict does, as into any shared tensor.

        Args:
            linear: A plain nn.Linear (no subclass, hooks or shards) or Transformers Conv1D; itself left as it is.
            r, alpha, rslora, dropout_p, adapter_dtype: as for the class.

        Returns:
            The module, on linear's device and in its training mode.

        Raises:
            TypeError, ValueError: an argument does not fit; the text names it and the remedy.
        """
        return cls._around(linear, r=r, alpha=alpha, rslora=rslora, dropout_p=dropout_p, adapter_dtype=adapter_dtype)

    def extra_repr(self) -> str:
        """The arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, alpha={self.alpha}, rslora={self.rslora}"

    def _adapted(self, x: Tensor, dropout_p: float) -> Tensor:
        return functional.lora_linear(x, self.weight, self.A, self.B, self.scale, self.bias, dropout_p=dropout_p)


def lora_scale(kind: str, alpha: float, r: int, rslora: bool) -> float:
    """s: alpha / r, or alpha / √r for rsLoRA."""
    return checks.number(kind, "alpha", alpha) / (math.sqrt(r) if rslora else r)
