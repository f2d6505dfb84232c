"""DoRA over a mixture: a layer's adapters with `use_dora` rescale all but the bias.

    y ← c ⊙ (y − bias + Σ_e w_te s_e B_e A_e x_t − γ Σ_e s_e B⁰_e A⁰_e x_t) + bias,
    c = m / ‖W̄‖ by rows, a constant but for m

W̄ is the mean gate's weight. Of several adapters each rescales what those before it gave, and its
norm is that of the frozen weight with its own update, as PEFT has it of several DoRAs.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.autograd.mixture import mean_gate
from delora_kernels.functional.channel_term import rescale_rows
from delora_kernels.integrations.peft.row_norm import constant_row_norm


class _Mixture(NamedTuple):
    """What `mean_gate` reads of an adapter."""

    A: Tensor
    B: Tensor
    scale: Tensor
    frozen_A: Tensor | None = None
    frozen_B: Tensor | None = None
    residual: Tensor | None = None


class RescaledLayer:
    """What a layer does with the magnitudes of its adapters; comes first among its bases."""

    goat_magnitude: nn.ParameterDict
    _unmerged: Tensor | None
    _base_weight: Any
    _seen: Any
    _mixture: Any
    _mixed: Any

    @property
    def additive(self) -> bool:
        """Whether no adapter rescales what it stands around."""
        return len(self.goat_magnitude) == 0

    @torch.no_grad()
    def reset_magnitude(self, adapter_name: str) -> None:
        """Start an adapter's magnitude, if it has one, at the norms that it is divided by."""
        if adapter_name in self.goat_magnitude:
            norm = self._mean_gate_norm(adapter_name)
            self.goat_magnitude[adapter_name].copy_(norm.masked_fill(norm.isinf(), 0.0))

    def beside(self, name: str, x: Tensor, y: Tensor, bias: Tensor | None) -> Tensor:
        """Return what an adapter makes of y [..., N], the output of the base and of the adapters
        before it.
        """
        u = y + self._mixed(name, x, None, None).to(y.dtype)
        return rescale_rows(u, self.column_scale(name), bias).to(y.dtype) if name in self.goat_magnitude else u

    def column_scale(self, name: str) -> Tensor:
        """c [N] of an adapter that has a magnitude."""
        return self.goat_magnitude[name] / self._mean_gate_norm(name)

    @torch.no_grad()
    def _mean_gate_norm(self, name: str) -> Tensor:
        """‖W̄‖ by rows [N], of the weight without what is merged into it; ∞ where it is 0."""
        weight = self._base_weight() if self._unmerged is None else self._seen(self._unmerged)
        # FSDP leaves what is flat, empty or a DTensor in its place
        whole = weight.dim() == 2 and weight.numel() > 0 and not hasattr(weight, "device_mesh")
        if weight.is_meta or not whole or weight.dtype not in checks.FLOATS:
            raise RuntimeError(
                f"adapter {name!r} with use_dora=True needs the norms of its base weight, and that is "
                f"{'not on this device' if weight.is_meta else f'a {type(weight).__name__} {list(weight.shape)}'} of "
                f"{weight.dtype}; keep the weight whole where the layer runs, or train with use_dora=False"
            )
        tensors = {role: value for role, value in self._mixture(name).items() if role != "router"}
        return constant_row_norm(weight, *mean_gate(_Mixture(**tensors)), 1.0)
