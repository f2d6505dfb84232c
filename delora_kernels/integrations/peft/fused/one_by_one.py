"""Adapters that PEFT applies one after the other, by torch's own operations: DoRA rescales what
the base and the adapters before it gave, or, where it drops inputs, adds its change of what the
base gives for these.

    u = y + scale · drop(x) Aᵀ Bᵀ
    DoRA:              y ← c ⊙ (u − bias) + bias,   c = m / ‖W + scale · BA‖
    DoRA with dropout: y ← y + (c − 1) ⊙ (drop(x) Wᵀ) + c ⊙ (scale · drop(x) Aᵀ Bᵀ)
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from delora_kernels.bases.plain import PlainBase
from delora_kernels.bases.stored import StoredBase
from delora_kernels.functional.channel_term import add_row_term, rescale_rows
from delora_kernels.functional.lora_by_sample import lora_linear_by_sample
from delora_kernels.integrations.peft.row_norm import constant_row_norm


def run_one_by_one(adapters: Sequence[Any], base: PlainBase | StoredBase, x: Tensor) -> Tensor:
    """Run a linear with several LoRA and DoRA adapters.

    Args:
        adapters: As plan.py reads them, in PEFT's order.
        base: The frozen linear; a stored one is made dense once for norms, and for each product.
        x: [..., K].
    """
    scales = _column_scales(adapters, base, x)
    y = _frozen(base, x, base.bias)
    dtype = y.dtype
    for adapter, c in zip(adapters, scales, strict=True):
        A, B, bias = adapter.tensors["lora_A"], adapter.tensors["lora_B"], adapter.tensors.get("lora_bias")
        x = x.to(A.dtype)
        dropped = dropout(x, adapter.dropout_p) if adapter.dropout_p else x
        h = linear(dropped, A)
        if c is not None and adapter.dropout_p:
            y = y + (c - 1) * _frozen(base, dropped, None)
            y = add_row_term(y, h, (B * c[:, None]).to(B.dtype), adapter.scale, fresh=True)
            continue
        y = add_row_term(y, h, B, adapter.scale, fresh=True)  # the frozen linear's, and ours after it
        if bias is not None:
            y = y + adapter.scale * bias
        if c is not None:
            y = rescale_rows(y, c, base.bias)
    return y.to(dtype)


def _column_scales(adapters: Sequence[Any], base: PlainBase | StoredBase, x: Tensor) -> list[Tensor | None]:
    """Return DoRA's c of each adapter, None of one that is none."""
    found: list[Tensor | None] = []
    weight = base.weight if isinstance(base, PlainBase) else base.dense(base.computes_in(x))
    for adapter in adapters:
        A, B, m = (adapter.tensors.get(role) for role in ("lora_A", "lora_B", "magnitude"))
        found.append(None if m is None else m / constant_row_norm(weight, A, B, adapter.scale))
    return found


def _frozen(base: PlainBase | StoredBase, x: Tensor, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias, in x's dtype where adapters have made that another one than W's."""
    if isinstance(base, PlainBase):
        autocast = torch.is_autocast_enabled(x.device.type)
        weight = base.weight if autocast or base.weight.dtype == x.dtype else base.weight.to(x.dtype)
        return linear(x, weight, bias)
    return lora_linear_by_sample(x, base.weight, [], [], [None] * len(x), bias=bias)
