"""GoatLinear: a mixture of experts that start on segments of the weight's singular values."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from delora_kernels import checks
from delora_kernels.nn.goat_start import STARTS, moe_start
from delora_kernels.nn.moe import MoELoRALinear

RESIDUALS = ("stacked", "folded")


class GoatLinear(MoELoRALinear):
    """GOAT: a mixture whose experts start on segments of the weight's singular values.

        y_t = W x_t + Σ_e (w_te s_e B_e A_e − γ s_e B⁰_e A⁰_e) x_t + bias

    At the start A = A⁰, B = B⁰: with γ = 1/E the router's mean weight, y is the frozen linear's on
    average over tokens, exactly where all gates are 1/E. W itself is never written:
    `residual="stacked"` subtracts the start in rank space; "folded" keeps W − γ Σ s_e B⁰_e A⁰_e as
    a buffer of weight's dtype, as the authors' code puts it into the weight.

    Args:
        in_features, out_features, r, experts, top_k, renormalize, bias, balance_coef, z_coef,
            balance, dropout_p, dropout, dora, adapter_dtype, device, dtype: as for `MoELoRALinear`.
        alpha: Of the scalings "alpha/r" and "rslora".
        start, scaling, eta, rho, svd: as in `nn.goat_start.moe_start`.
        init_cof: γ; None: 1/E (their Theorem 3.4).
        residual: "stacked" or "folded".

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Fan et al. (arXiv:2502.16894), equations 10-19; Facico/GOAT-PEFT.
    """

    expert_scale: Tensor
    frozen_A: Tensor | None
    frozen_B: Tensor | None
    residual_weight: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 4,
        experts: int = 8,
        top_k: int | None = 2,
        alpha: float = 16.0,
        *,
        start: str = "goat",
        scaling: str | float | Sequence[float] = "theory",
        eta: float = 1.0,
        rho: float = 10.0,
        svd: str = "full",
        init_cof: float | None = None,
        residual: str = "stacked",
        **mixture: Any,
    ) -> None:
        kind = type(self).__name__
        checks.option(kind, "start", start, STARTS)
        self.start: dict[str, Any] = {"start": start, "scaling": scaling, "eta": eta, "rho": rho, "svd": svd}
        self._init_cof = None if init_cof is None else checks.number(kind, "init_cof", init_cof)
        self.residual = checks.option(kind, "residual", residual, RESIDUALS)
        super().__init__(in_features, out_features, r, experts, top_k, alpha, **mixture)

    def _make(self) -> None:
        self.init_cof = 1 / self.experts if self._init_cof is None else self._init_cof
        vector = self.A.new_empty(self.experts, dtype=self._vector_dtype, requires_grad=False)
        self.register_buffer("expert_scale", vector)
        stacked = self.residual == "stacked" and self.start["start"] != "zero"
        folded = self.residual == "folded" and self.start["start"] != "zero"
        like = {
            "frozen_A": stacked and self.A,
            "frozen_B": stacked and self.B,
            "residual_weight": folded and self.weight,
        }
        # those that there are first: torch.export miscounts buffers behind one that is None
        for name, tensor in sorted(like.items(), key=lambda item: item[1] is False):
            self.register_buffer(name, None if tensor is False else torch.empty_like(tensor, requires_grad=False))

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        if self.weight.is_meta:
            return
        A, B, scale, _ = moe_start(self.weight, self.experts, self.r, alpha=self.alpha, **self.start)
        self.A.copy_(A)
        self.B.copy_(B)
        self.expert_scale.copy_(scale)
        if self.frozen_A is not None and self.frozen_B is not None:
            self.frozen_A.copy_(self.A)
            self.frozen_B.copy_(self.B)
        if self.residual_weight is not None:
            start = torch.einsum("enr,erk->nk", B * scale[:, None, None], A)
            self.residual_weight.copy_(self.weight.float() - self.init_cof * start)

    def _mixture(self) -> dict[str, Any]:
        weight = self._call_weight() if self.residual_weight is None else self.residual_weight
        tensors = {"weight": weight, "A": self.A, "B": self.B, "router": self.router, "scale": self.expert_scale}
        if self.frozen_A is None:
            return tensors
        return {
            **tensors,  # the oldest torch can't trace dict | dict
            "frozen_A": self.frozen_A,
            "frozen_B": self.frozen_B,
            "residual": self.init_cof * self.expert_scale,
        }
