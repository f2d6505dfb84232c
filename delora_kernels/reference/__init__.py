"""The specification: every method in plain eager torch, differentiable by autograd, one file of
maths per method.

Names and arguments are those of `delora_kernels.functional`, with `dropout_mask=` (the mask itself)
in place of `dropout_p=` and `seed=`. Nothing here saves memory or imports the rest of the package.
Arguments are not checked, but for `dropout` of `dora_linear`: what torch refuses it refuses in its
own words, and what does not belong together may give a wrong result. All tensors of a call share
one float dtype; float64 is what tests compare with. (Factors may be wider than x and W, y is then
as wide: programs that are exported are made of these formulas.) `*_weight` materialises the same
linear map as one matrix W' `[N, K]`, by a second formula: y = x W'ᵀ + bias.

Letters: T tokens (all leading dimensions of x), K in-features, N out-features, r rank. `⊙`
broadcasts a vector.
"""

from delora_kernels.reference.delora import delora_factors, delora_linear, delora_weight
from delora_kernels.reference.dora import dora_linear, dora_weight
from delora_kernels.reference.ether import (
    ether_linear,
    ether_plus_linear,
    ether_plus_weight,
    ether_qkv_linear,
    ether_weight,
)
from delora_kernels.reference.grouped import (
    grouped_delora_linear,
    grouped_delora_weight,
    grouped_dora_linear,
    grouped_dora_linear_dense,
    grouped_dora_weight,
    grouped_lora_linear,
    grouped_lora_linear_dense,
    grouped_lora_weight,
)
from delora_kernels.reference.lora import lora_linear, lora_weight
from delora_kernels.reference.lora_by_sample import lora_linear_by_sample
from delora_kernels.reference.moe import RouterStats, moe_lora_linear, moe_lora_linear_dense

__all__ = [
    "RouterStats",
    "delora_factors",
    "delora_linear",
    "delora_weight",
    "dora_linear",
    "dora_weight",
    "ether_linear",
    "ether_plus_linear",
    "ether_plus_weight",
    "ether_qkv_linear",
    "ether_weight",
    "grouped_delora_linear",
    "grouped_delora_weight",
    "grouped_dora_linear",
    "grouped_dora_linear_dense",
    "grouped_dora_weight",
    "grouped_lora_linear",
    "grouped_lora_linear_dense",
    "grouped_lora_weight",
    "lora_linear",
    "lora_linear_by_sample",
    "lora_weight",
    "moe_lora_linear",
    "moe_lora_linear_dense",
]
