"""DeLoRALinear: a normalised low-rank update whose directions and strength λ are learned apart."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from delora_kernels import checks, functional, ops
from delora_kernels.nn.base import AdapterLinear, BaseOptions
from delora_kernels.op_arguments import Start, Strength

STARTS = ("zero", "frozen_live", "frozen_paper")
WEIGHT_NORMS = ("column", "frobenius")


class DeLoRALinear(AdapterLinear):
    """A frozen linear with a normalised low-rank update of bounded norm: angle and strength learn
    apart.

        y = x Wᵀ + drop(x) Âᵀ B̂ᵀ + bias,   Â = diag(1/‖A_i‖) A diag(n),   B̂ = B diag(λ / (r ‖B_i‖))

    At the start y is the frozen linear's. `start` says how, and what the first gradients are:

        "zero"           PEFT: B is 0, norms are clamped at 1e-4. Exact; B's first gradient is
                         thousands of times LoRA's
        "frozen_live"    the authors' code: A and B are random, copies of them are subtracted,
                         scaled by the live λ
        "frozen_paper"   the paper: the same copies scaled by λ₀, the first λ

    A (and B of the frozen starts) is Kaiming uniform with a = √5. `lam` λ `[1]` is a parameter;
    `weight_norm` n and the copies `frozen_A` `[r, K]`, `frozen_B` `[N, r]`, `frozen_lam` `[1]` are
    buffers in the state dict, n taken from the weight when the adapter starts. Merged: W' = W + B̂
    Â less the copies' own update.

    Args:
        in_features, out_features, r, bias, dropout_p, adapter_dtype, device, dtype: as in
            `LoRALinear`.
        lam: λ at the start.
        start: "zero", "frozen_live" or "frozen_paper".
        weight_norm: What n is: "column", the norm of each input column of W (`[K]`; PEFT and the
            authors' code), or "frobenius", the one number ‖W‖ (the paper), about √K times as large:
            choose λ accordingly.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al., "Decoupling Angles and Strength in Low-rank Adaptation" (arXiv:2503.18225),
    eqs. 5-9.
    """

    _function = functional.delora_linear
    weight_norm: Tensor
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    frozen_lam: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        lam: float = 15.0,
        *,
        start: str = "zero",
        weight_norm: str = "column",
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, r, **base)
        kind = type(self).__name__
        self.initial_lam = checks.number(kind, "lam", lam)
        self.start = checks.option(kind, "start", start, STARTS)
        self.weight_norm_kind = checks.option(kind, "weight_norm", weight_norm, WEIGHT_NORMS)
        self.eps = 1e-4 if start == "zero" else 0.0
        self.lam = nn.Parameter(self.A.new_empty(1, dtype=self._vector_dtype))
        norm_shape = (in_features,) if weight_norm == "column" else ()
        self.register_buffer("weight_norm", self.A.new_empty(norm_shape, dtype=self._vector_dtype))
        frozen = start != "zero"
        self.register_buffer("frozen_A", torch.empty_like(self.A, requires_grad=False) if frozen else None)
        self.register_buffer("frozen_B", torch.empty_like(self.B, requires_grad=False) if frozen else None)
        self.register_buffer(
            "frozen_lam", torch.empty_like(self.lam, requires_grad=False) if start == "frozen_paper" else None
        )
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        text = f"{super().extra_repr()}, initial_lam={self.initial_lam}"
        return f"{text}, start={self.start!r}, weight_norm={self.weight_norm_kind!r}"

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        self.lam.fill_(self.initial_lam)
        over = 0 if self.weight_norm_kind == "column" else None
        self.weight_norm.copy_(torch.linalg.vector_norm(self.weight, dim=over, dtype=self.weight_norm.dtype))
        # copied into buffers of their own: where they share A's and B's memory, as in the authors'
        # code, ΔW stays 0
        if self.frozen_A is not None and self.frozen_B is not None:
            nn.init.kaiming_uniform_(self.B, a=math.sqrt(5))
            self.frozen_A.copy_(self.A)
            self.frozen_B.copy_(self.B)
        if self.frozen_lam is not None:
            self.frozen_lam.copy_(self.lam)

    def _arguments(self) -> dict[str, Any]:
        start = {"frozen_A": self.frozen_A, "frozen_B": self.frozen_B, "frozen_lam": self.frozen_lam}
        return {"lam": self.lam, "weight_norm": self.weight_norm, "eps": self.eps, **start}

    def _factors(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, float]:
        strength = Strength(self.lam, self.weight_norm, self.eps)
        start = Start(self.frozen_A, self.frozen_B, self.frozen_lam)
        A_hat, B_hat, _, _ = ops.fold(self.A, self.B, strength, start, dtype, "eager")
        return A_hat, B_hat, 1.0
