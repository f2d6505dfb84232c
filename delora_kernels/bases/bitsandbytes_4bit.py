"""bitsandbytes' 4-bit linears: nf4 and fp4, with double quantisation or without, any storage dtype.

What its forward does besides x Wᵀ + bias is done here too: a quant_state that the parameter has
lost and the module has kept is put back, the compute dtype is settled by the first input, x is cast
to it and y back. Not done: it writes the bias in the compute dtype; here it is cast at each call.
"""

import math
from functools import partial
from typing import Any

import torch
from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise
from bitsandbytes.nn import modules as bitsandbytes_modules
from bitsandbytes.nn.modules import Linear4bit, Params4bit, fix_4bit_weight_quant_state_from_module
from torch import Tensor, nn

from delora_kernels.bases.plain import why_not_local
from delora_kernels.bases.stored import CASTABLE, Broken, Parts, StoredBase

HALVED = 2**20
"""Bytes of a dense W from which a backward pass in float32 makes one half of it after the other."""


class Bitsandbytes4bit(StoredBase):
    """The base inside a Linear4bit."""

    packed: Tensor
    state: dict[str, Any]
    module: Any

    @classmethod
    def why_not(cls, module: Any) -> str | None:
        """Say why the base inside a Linear4bit can't be read now, or None."""
        forward: Any = type(module).forward
        if forward is not Linear4bit.forward or forward.__globals__ is not vars(bitsandbytes_modules):
            return "the forward of its base layer's class has been replaced"
        weight = module.weight
        if type(weight) not in (Params4bit, nn.Parameter):  # as which a pickle gives it back
            return f"its packed weight is a {type(weight).__name__}, not bitsandbytes' Params4bit (FSDP shards it?)"
        state = getattr(weight, "quant_state", None)
        if state is None:
            state = module.quant_state
            if state is None:
                return (
                    "its packed weight has no quant_state: it is not quantised yet (move the model to its device), or "
                    "the state was lost (load the model again)"
                )
        if getattr(state, "packing_format_for_cpu", False):
            return Broken(
                "its weight is packed for inference on this CPU, and its own forward has no gradient then: load the "
                "model again, and do not run it in eval() without gradients while its adapters are off",
                only_training=True,
            )
        return cls._why_not_state(module, weight, state) or (
            None if module.bias is None else why_not_local(module.bias, "base bias")
        )

    @classmethod
    def _why_not_state(cls, module: Any, weight: Tensor, state: QuantState) -> str | None:
        if weight.is_meta or state.absmax.is_meta:
            return "its packed weight is on the meta device"
        if weight.device != state.absmax.device:
            return f"its packed weight is on {weight.device}, its quant_state on {state.absmax.device}"
        if state.shape != (module.out_features, module.in_features):
            return f"its packed weight is of shape {list(state.shape)}, not [out_features, in_features]"
        if state.state2 is not None and state.state2.blocksize != 256:
            return f"its block scales are quantised in blocks of {state.state2.blocksize}, not 256"
        stored = getattr(weight, "quant_storage", weight.dtype)
        if weight.dtype != stored:
            return Broken(
                f"its packed weight was stored as {stored} and is {weight.dtype} now: a cast has changed its bytes; "
                "load the model again, and cast no packed weight"
            )
        held, whole = weight.numel() * weight.element_size(), (state.shape.numel() + 1) // 2
        if held < whole or held >= whole + weight.element_size():
            return Broken(
                f"its packed weight has {held} bytes where its {list(state.shape)} weights take {whole}: it is a shard "
                "or another layer's; gather it, or load the model again"
            )
        return None

    @classmethod
    def of(cls, module: Any) -> "Bitsandbytes4bit":
        """Read the base inside a Linear4bit."""
        fix_4bit_weight_quant_state_from_module(module)
        weight, state = module.weight, module.weight.quant_state
        compute_dtype = module.compute_dtype if module.compute_type_is_set else None
        nested = None if state.state2 is None else state.state2.blocksize
        key = (state.quant_type, state.blocksize, nested, weight.dtype, state.dtype, state.shape[1] % 2)
        base = cls(state.shape, weight.device, module.bias, compute_dtype, key)
        base.packed = weight.data  # other memory than the parameter's, once somebody packs that anew
        names = ("absmax", "shape", "code", "blocksize", "quant_type", "offset", "state2")
        base.state = {name: getattr(state, name) for name in names}
        base.module = module
        return base

    def dense(self, dtype: torch.dtype) -> Tensor:
        """Dequantise into `dtype`, rounded once; bitsandbytes has no float64."""
        made = dtype if dtype in CASTABLE else torch.float32
        weight: Tensor = dequantize_4bit(self.packed, QuantState(**self.state, dtype=made))
        return weight if made == dtype else weight.to(dtype)

    def dense_parts(self, dtype: torch.dtype) -> Parts:
        """Say how to make W, in float32 the rows of either half: what a GEMM sums of the two is
        rounded as what it sums of one. The block scales of both are made once.
        """
        (N, K), block = self.shape, self.state["blocksize"]
        whole_blocks = block // math.gcd(K, block)  # rows
        rows = N // 2 // whole_blocks * whole_blocks
        if dtype != torch.float32 or 4 * N * K < HALVED or K % 2 or rows == 0:
            return super().dense_parts(dtype)
        absmax, state2 = self.state["absmax"], self.state["state2"]
        if state2 is not None:
            absmax = dequantize_blockwise(absmax, state2).add_(self.state["offset"])
        halves = (slice(0, rows), slice(rows, N))
        return [(half, partial(self._dense_rows, half, absmax)) for half in halves]

    def _dense_rows(self, rows: slice, absmax: Tensor) -> Tensor:
        (_, K), block = self.shape, self.state["blocksize"]
        first, last = rows.start * K, rows.stop * K
        packed = self.packed.view(torch.uint8).view(-1)[first // 2 : last // 2, None]
        absmax = absmax.view(-1)[first // block : -(-last // block)]
        same = {name: self.state[name] for name in ("code", "blocksize", "quant_type")}
        shape = torch.Size((rows.stop - rows.start, K))
        made: Tensor = dequantize_4bit(packed, QuantState(absmax, shape, dtype=torch.float32, **same))
        return made

    def computes_in(self, x: Tensor) -> torch.dtype:
        """Return the compute dtype, which the first float32 or bfloat16 input settles."""
        if not self.module.compute_type_is_set:
            self.module.set_compute_type(x)
            self.module.compute_type_is_set = True
        self.compute_dtype = self.module.compute_dtype
        return super().computes_in(x)
