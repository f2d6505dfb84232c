"""GPTQModel's linears with its torch kernel, of any number of bits.

Their `dequantize_weight` gives Wᵀ [K, N] in the dtype of the scales; their forward casts it to
that of the tokens and multiplies. Nothing of the library is imported: the module brings it along.
"""

from typing import Any

import torch
from torch import Tensor

from delora_kernels.bases.plain import why_not_local
from delora_kernels.bases.stored import StoredBase

_HELD = ("qweight", "qzeros", "scales", "g_idx")


class GptqmodelBase(StoredBase):
    """The base inside a TorchLinear."""

    module: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Say why the base inside the linear can't be read now, or None."""
        held = [getattr(module, name, None) for name in _HELD]
        if not all(isinstance(each, Tensor) for each in held):
            return "its base layer is not quantised yet, or its codes were taken away"
        if any(each.is_meta or each.device != held[0].device for each in held):  # type: ignore[union-attr]
            return "its codes are on the meta device, or not on one device"
        if getattr(module, "adapter", None) is not None:
            return "its base layer has an adapter of GPTQModel's own"
        if len(module.g_idx) != module.in_features:
            return f"its g_idx has {len(module.g_idx)} elements for {module.in_features} in-features"
        return None if module.bias is None else why_not_local(module.bias, "base bias")

    @classmethod
    def of(cls, module: Any) -> "GptqmodelBase":
        """Read the base inside the linear, whose codes never change."""
        # it dequantises by other code in training, and by compiled code once it is optimised
        # its `dynamic` settings give each layer of a model bits and groups of its own
        group = module.in_features // max(1, len(module.scales))
        how = (module.bits, group, module.training, "dequantize_weight" in module.__dict__)
        key = (*how, module.qweight.dtype, module.scales.dtype)
        base = cls((module.out_features, module.in_features), module.qweight.device, module.bias, key=key)
        base.module, base.compared_in = module, module.scales.dtype
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise in the dtype of the scales, as GPTQModel does, and cast."""
        with torch.no_grad():
            return self.module.dequantize_weight(num_itr=1).to(dtype).t()

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y as it does: under autocast in autocast's dtype."""
        return y
