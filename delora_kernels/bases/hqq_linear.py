"""HQQ's linears, of any number of bits.

Their forward is chosen for the whole class (`HQQLinear.set_backend`); they multiply tokens of their
compute dtype alone.
"""

from typing import Any

import torch
from hqq.core.quantize import HQQLinear, Quantizer
from torch import Tensor

from delora_kernels.bases.stored import StoredBase


class HqqBase(StoredBase):
    """The base inside an HQQLinear."""

    packed: Tensor
    meta: dict[str, Any]

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Say why the base inside an HQQLinear can't be read now, or None."""
        forward = getattr(HQQLinear, HQQLinear.backend.value, None)
        if type(module).forward is not forward:
            return "the forward of its base layer's class is not that of HQQ's backend"
        if not module.ready or module.W_q is None:
            return "its base layer is not quantised yet"
        meta = module.meta
        if meta["quant_zero"] or meta["quant_scale"] or "zero_scale" in meta:
            return "its scales are quantised or offloaded themselves"
        if module.W_q.is_meta or module.W_q.device != meta["scale"].device:
            return f"its codes are on {module.W_q.device}, its scales on {meta['scale'].device}"
        return None

    @classmethod
    def of(cls, module: Any) -> "HqqBase":
        """Read the base inside an HQQLinear."""
        meta, names = module.meta, ("nbits", "group_size", "axis", "packing", "view_as_float")
        key = (HQQLinear.backend.value, *[meta.get(name) for name in names])
        base = cls(meta["shape"], module.W_q.device, module.bias, module.compute_dtype, key)
        base.packed, base.meta = module.W_q.data, dict(meta)
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise in the compute dtype, as HQQ does, and cast."""
        weight: Tensor = Quantizer.dequantize(self.packed, self.meta)
        return weight if weight.dtype == dtype else weight.to(dtype)

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y as HQQ does: under autocast in autocast's dtype."""
        return y

    def why_not_input(self, x: Tensor) -> str | None:
        """Say why a product with x is left to HQQ's own forward, or None: without autocast it takes
        its compute dtype alone.
        """
        reason = super().why_not_input(x)
        if reason is None and x.dtype != self.compute_dtype and not torch.is_autocast_enabled(x.device.type):
            return f"its input is {x.dtype}, and HQQ's compute dtype {self.compute_dtype}"
        return reason
