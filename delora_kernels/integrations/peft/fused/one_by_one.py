"""Adapters that PEFT applies one after the other, by torch's own operations: DoRA rescales what the
base and the adapters before it gave.

    u = y + scale · drop(x) Aᵀ Bᵀ;   DoRA: y ← c ⊙ (u − bias) + bias,   c = m / ‖W + scale · BA‖
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import dropout, linear

from delora_kernels import ops
from delora_kernels.bases.plain import PlainBase
from delora_kernels.checks import active_transform
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.functional.channel_term import add_row_term, rescale_rows
from delora_kernels.functional.common import exporting


def run_one_by_one(adapters: Sequence[Any], base: PlainBase, x: Tensor) -> Tensor:
    """Run a linear with several LoRA and DoRA adapters.

    Args:
        adapters: As plan.py reads them, in PEFT's order; a DoRA's dropout drops nothing.
        base: The frozen linear.
        x: [..., K].
    """
    y = linear(x, base.weight, base.bias)
    dtype = y.dtype
    for adapter in adapters:
        A, B, bias = adapter.tensors["lora_A"], adapter.tensors["lora_B"], adapter.tensors.get("lora_bias")
        x = x.to(A.dtype)
        h = linear(dropout(x, adapter.dropout_p) if adapter.dropout_p else x, A)
        y = add_row_term(y, h, B, adapter.scale, fresh=True)  # F.linear's, and ours after it
        if bias is not None:
            y = y + adapter.scale * bias
        if "magnitude" in adapter.tensors:
            c = adapter.tensors["magnitude"] / constant_row_norm(base.weight, A, B, adapter.scale)
            y = rescale_rows(y, c, base.bias)
    return y.to(dtype)


def constant_row_norm(weight: Tensor, A: Tensor, B: Tensor, scale: float) -> Tensor:
    """Compute DoRA's ‖W + scale · BA‖ by rows, without a gradient and (but in a program that is
    exported, and under transforms) without BA; ∞ where it is 0, for there is no direction to scale.

    Args:
        weight: W, `[N, ...]`: a row is all but the first dimension.
        A: `[r, ...]` likewise.
        B: `[N, r]`, or with more dimensions of size 1.
        scale: Factor of the update.

    Returns:
        `[N]`, in float32 or wider.
    """
    acc = accumulate_dtype(weight.dtype)
    with torch.no_grad(), torch.autocast(weight.device.type, enabled=False):
        rows, A, B = weight.flatten(1), A.flatten(1).to(acc), B.flatten(1).to(acc)
        norm: Tensor
        if exporting() or active_transform((weight, A, B)) is not None:
            norm = torch.linalg.vector_norm(torch.addmm(rows.to(acc), B, A, alpha=scale), dim=1)
        else:
            norm = ops.stages("eager", (rows, A, B)).row_norm(rows, A, B, scale, None, False)[0]
        return norm.masked_fill(norm == 0, torch.inf).detach()  # a constant of forward mode too
