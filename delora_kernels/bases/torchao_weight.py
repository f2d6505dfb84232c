"""torchao's quantised tensors as the weight of an nn.Linear, where only the weight is quantised."""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.bases.plain import why_not_local
from delora_kernels.bases.stored import StoredBase


class TorchaoWeight(StoredBase):
    """The base inside an nn.Linear whose weight is one of torchao's tensors."""

    packed: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Say why the base inside the linear can't be read now, or None."""
        weight = module.weight
        for name, what in (("act_quant_kwargs", "quantises its input"), ("act_pre_scale", "scales its input")):
            if getattr(weight, name, None) is not None:
                return f"its torchao weight {what}"
        if weight.requires_grad:
            return "its torchao weight requires a gradient"
        if weight.dim() != 2 or weight.is_meta:
            return f"its torchao weight has shape {list(weight.shape)} on {weight.device}"
        return None if module.bias is None else why_not_local(module.bias, "base bias")

    @classmethod
    def of(cls, module: Any) -> "TorchaoWeight":
        """Read the base inside the linear."""
        weight = module.weight
        block = tuple(getattr(weight, "block_size", ()))
        whole = tuple(size == full for size, full in zip(block, weight.shape, strict=False))
        base = cls(weight.shape, weight.device, module.bias, key=(type(weight), weight.dtype, whole))
        base.packed, base.compared_in = weight, weight.dtype
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise into `dtype`."""
        made: Tensor = self.packed.dequantize(dtype)
        return made if made.dtype == dtype else made.to(dtype)
