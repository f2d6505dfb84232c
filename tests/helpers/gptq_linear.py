"""A linear of GPTQModel's with its torch kernel: the library's own where it is installed, or one
written after its description, with the names, buffers and arithmetic of its version 7.7.
"""

from typing import Any

import pytest
import torch
from torch import Tensor, nn


class StandIn(nn.Module):
    """Codes [K · bits / 32, N] of int32, low bits first; a scale and a zero for each group of rows
    of Wᵀ.
    """

    def __init__(self, bits: int, group: int, K: int, N: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.bits, self.in_features, self.out_features, self.adapter = bits, K, N, None
        self.register_buffer("qweight", torch.zeros(K * bits // 32, N, dtype=torch.int32))
        self.register_buffer("qzeros", torch.zeros(K // group, N * bits // 32, dtype=torch.int32))
        self.register_buffer("scales", torch.zeros(K // group, N, dtype=dtype))
        self.register_buffer("g_idx", torch.arange(K, dtype=torch.int32) // group)
        self.register_buffer("bias", torch.zeros(N, dtype=dtype))

    def dequantize_weight(self, num_itr: int = 1) -> Tensor:
        """Wᵀ [K, N]."""
        assert num_itr == 1
        shifts, largest = torch.arange(0, 32, self.bits, dtype=torch.int32), 2**self.bits - 1
        codes = (self.qweight[:, None, :] >> shifts[None, :, None]) & largest
        zeros = ((self.qzeros[:, :, None] >> shifts) & largest).reshape(self.scales.shape)
        group = self.g_idx.long()
        W: Tensor = self.scales[group] * (codes.reshape(-1, self.out_features) - zeros[group])
        return W

    def forward(self, x: Tensor) -> Tensor:
        """x [..., K] → [..., N] in x's dtype."""
        y = torch.matmul(x.reshape(-1, self.in_features), self.dequantize_weight().to(x.dtype))
        return y.reshape(*x.shape[:-1], self.out_features).add_(self.bias.to(y.dtype))


StandIn.__module__, StandIn.__qualname__ = "gptqmodel.nn_modules.qlinear.torch", "TorchLinear"


def gptq(
    N: int,
    K: int,
    *,
    bits: int = 4,
    group: int = 16,
    dtype: torch.dtype = torch.float16,
    shuffled: bool = False,
    own: bool = False,
) -> Any:
    """A linear of random codes in groups of rows of Wᵀ; `shuffled`: these in any order of groups,
    as `desc_act` has them; `own`: the library's.
    """
    if own:
        library = pytest.importorskip("gptqmodel.nn_modules.qlinear.torch", reason="needs GPTQModel")
        made = library.TorchLinear(
            bits=bits, group_size=group, sym=False, desc_act=shuffled, in_features=K, out_features=N, bias=True
        )
        made.optimized = True  # it would compile how it dequantises
        made.post_init()
    else:
        made = StandIn(bits, group, K, N, dtype)
    for codes in (made.qweight, made.qzeros):
        codes.copy_(torch.randint(-(2**31), 2**31, codes.shape))
    made.scales = (torch.rand(made.scales.shape) * 2.0**-bits / K**0.5).to(dtype)
    made.bias = torch.randn(N).to(dtype)
    made.g_idx = (torch.randint(K // group, (K,)) if shuffled else torch.arange(K) // group).to(torch.int32)
    return made
