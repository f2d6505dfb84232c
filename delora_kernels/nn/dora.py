"""DoRALinear: low-rank updates turn the rows of a frozen weight, a learned magnitude sets their
lengths.
"""

from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from delora_kernels import checks, functional, ops
from delora_kernels.nn.base import AdapterLinear, BaseOptions
from delora_kernels.nn.lora import lora_scale


class DoRALinear(AdapterLinear):
    """A frozen linear whose updated weight rows are rescaled to learned magnitudes.

        y = c ⊙ (x Wᵀ + s · x Aᵀ Bᵀ) + bias,   c = m / ‖W + s · B A‖ by rows, the norm detached

    `magnitude` m `[N]` starts at ‖W + s · B A‖, B at 0: y is the frozen linear's up to rounding. A
    row of W that is zero is one without direction: its output stays the bias. Merged: W' = c ⊙ (W +
    s · B A), whose row norms are |m|.

    Args:
        in_features, out_features, r, alpha, rslora, bias, dropout_p, adapter_dtype, device,
            dtype: as in `LoRALinear`.
        dropout: "peft" (all that the adapter adds sees the dropped x; a second frozen GEMM) or
            "branch" (only the low-rank branch does).
        saved: "private" (backward keeps a `[T, N]` tensor of its own) or "output" (it keeps y,
            which costs nothing where the consumer keeps y too: no bias, no dropout="peft" with
            dropout_p > 0, y not changed in place).

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Liu et al., "DoRA: Weight-Decomposed Low-Rank Adaptation" (arXiv:2402.09353), eq. 5 and
    section 4.3.
    """

    _function = functional.dora_linear

    def __init__(
        self,
        in_features: int,
        out_features: int,
        r: int = 8,
        alpha: float = 8.0,
        *,
        rslora: bool = False,
        dropout: str = "peft",
        saved: str = "private",
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, r, **base)
        kind = type(self).__name__
        self.alpha, self.rslora = alpha, rslora
        self.scale = lora_scale(kind, alpha, r, rslora)
        self.dropout = checks.option(kind, "dropout", dropout, ("peft", "branch"))
        self.saved = checks.option(kind, "saved", saved, ("private", "output"))
        if saved == "output" and (self.bias is not None or (dropout == "peft" and self.dropout_p > 0)):
            got = "'output' with a bias" if self.bias is not None else "'output' with dropout='peft' and dropout_p > 0"
            raise checks.fail(ValueError, kind, "saved", "'private' here", got, "y does not hold c ⊙ u then")
        self.magnitude = nn.Parameter(self.A.new_empty(out_features, dtype=self._vector_dtype))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        text = f"{super().extra_repr()}, alpha={self.alpha}, rslora={self.rslora}"
        return f"{text}, dropout={self.dropout!r}, saved={self.saved!r}"

    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        with torch.no_grad():
            self.magnitude.copy_(row_norms(self.weight, self.A, self.B, self.scale))

    def _arguments(self) -> dict[str, Any]:
        return {"magnitude": self.magnitude, "scale": self.scale, "dropout": self.dropout, "saved": self.saved}

    def _rescaled(self, updated: Tensor, rows: slice) -> Tensor:
        norm = torch.linalg.vector_norm(updated, dim=1)
        c = self.magnitude[rows].to(norm.dtype) / norm.masked_fill(norm == 0, torch.inf)
        return updated * c[:, None]


def row_norms(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """‖W + s · B A‖ by rows, as a forward pass computes it, so that DoRA's c is exactly 1 at the
    start.
    """
    norm: Tensor = ops.row_norm(weight, A.detach(), B.detach(), scale, None, False, "eager")[0]
    return norm
