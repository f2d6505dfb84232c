"""DeLoRAMoELinear: a mixture of normalised experts, each with a strength λ of its own."""

from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels import checks, functional
from delora_kernels.nn.moe import MoELoRALinear


class DeLoRAMoELinear(MoELoRALinear):
    """A mixture of DeLoRA experts: each normalised, with a strength λ_e of its own.

        y_t = W x_t + Σ_e w_te · λ_e / r · Σ_i b_ei/‖b_ei‖ ⟨a_ei/‖a_ei‖ ⊙ n, x_t⟩ + bias

    For weights that sum to at most 1, ‖ΔW_t‖_F ≤ max_e λ_e · max n. A starts Kaiming uniform, B at
    0 with norms clamped at 1e-4 (PEFT's start of DeLoRA): y is exactly the frozen linear's.

    Args:
        in_features, out_features, r, experts, top_k, renormalize, bias, balance_coef, z_coef,
            balance, dropout_p, dropout, dora, adapter_dtype, device, dtype: as for `MoELoRALinear`.
        lam: λ at the start, of every expert; `lam` `[E]` is a parameter.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al. (arXiv:2503.18225), eqs. 5-9, for each expert of Fan et al.
    (arXiv:2502.16894), equation 10.
    """

    weight_norm: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 4,
        experts: int = 8,
        top_k: int | None = 2,
        lam: float = 15.0,
        **mixture: Any,
    ) -> None:
        self.initial_lam = checks.number(type(self).__name__, "lam", lam)
        super().__init__(in_features, out_features, r, experts, top_k, **mixture)

    def _make(self) -> None:
        self.lam = nn.Parameter(self.A.new_empty(self.experts, dtype=self._vector_dtype))
        self.register_buffer("weight_norm", self.A.new_empty(self.in_features, dtype=self._vector_dtype))

    @torch.no_grad()
    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        self.lam.fill_(self.initial_lam)
        self.weight_norm.copy_(torch.linalg.vector_norm(self.weight, dim=0, dtype=self.weight_norm.dtype))

    def _mixture(self) -> dict[str, Any]:
        experts = normalised_experts(self.A, self.B, self.lam, self.weight_norm)
        return {"weight": self._call_weight(), "router": self.router, **experts}


def normalised_experts(A: Tensor, B: Tensor, lam: Tensor, weight_norm: Tensor) -> dict[str, Tensor]:
    """Return `A`, `B` and `scale` of the mixture whose experts are normalised as DeLoRA's adapter
    is.

    Args:
        A: `[E, r, K]`.
        B: `[E, N, r]`.
        lam: λ, `[E]`.
        weight_norm: n, `[K]`.
    """
    E, r, _ = A.shape
    # λ = E r leaves unit columns: each expert's own λ / r is its scale
    A_hat, B_hat = functional.delora_factors(A.flatten(0, 1), B.transpose(0, 1).flatten(1), float(E * r), weight_norm)
    return {"A": A_hat.view_as(A), "B": B_hat.unflatten(1, (E, r)).transpose(0, 1), "scale": lam / r}
