"""How one adapter of one of PEFT's layers is read as a pair of factors y += x A'ᵀ B'ᵀ, in files of
diffusion models also a convolution's, and DoRA's with its magnitude.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from peft.tuners.delora.layer import DeloraLinear
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from peft.tuners.lora.layer import Linear as LoraLinear
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant, DoraLinearVariant
from torch import Tensor, nn

from delora_kernels import ops
from delora_kernels.integrations.peft.export.refusal import refuse
from delora_kernels.op_arguments import Start, Strength

_PEFT_DELORA_EPS = 1e-4
"""PEFT's lower clamp of DeLoRA's norms."""

_CONVOLUTIONS: dict[type, type[nn.Module]] = {Conv1d: nn.Conv1d, Conv2d: nn.Conv2d, Conv3d: nn.Conv3d}
_ON_CONVOLUTION = "a low-rank term on a plain convolution"
_DORA = (DoraLinearVariant, DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)


class Fold(NamedTuple):
    """One adapter on one layer.

    Args:
        tensors: What it is made of, by role; "magnitude" [N] is DoRA's.
        factors: The dtype to compute in → A' [R, K] and B' [N, R].
        K, N: Sizes of the layer; of a convolution K is that of what one output sees.
    """

    tensors: dict[str, Tensor]
    factors: Callable[[torch.dtype], tuple[Tensor, Tensor]]
    K: int
    N: int


def peft_fold(name: str, layer: Any, adapter: str, diffusion: bool) -> Fold:
    """Read one adapter of PEFT's; raise where the file can't say it.

    Args:
        name, layer, adapter: Of the layer.
        diffusion: Whether the file holds convolutions and DoRA.
    """
    if hasattr(layer, "why_not_low_rank"):  # a layer of this library
        refuse(name, *layer.why_not_low_rank)
    # accelerate() puts a subclass of PEFT's class there, which computes the same
    kind = next(cls for cls in type(layer).__mro__ if not cls.__module__.startswith("delora_kernels."))
    if kind is DeloraLinear:
        return _of_delora(name, layer, adapter)
    convolution = _CONVOLUTIONS.get(kind) if diffusion else None
    if kind is not LoraLinear and convolution is None:
        refuse(name, f"a {kind.__module__.removeprefix('peft.tuners.')}.{kind.__qualname__} layer")
    variant = layer.lora_variant.get(adapter)
    if isinstance(variant, _DORA):
        if not diffusion:
            refuse(name, "DoRA, which rescales the rows of W itself")
    elif variant is not None:
        refuse(name, f"the LoRA variant {type(variant).__name__}", "see whether PEFT can convert or merge it")
    expected = {} if convolution is None else {"expected": _ON_CONVOLUTION}
    owners: dict[str, Any] = {"A": layer.lora_A[adapter], "B": layer.lora_B[adapter]}
    for role, owner in owners.items():
        if type(owner) is not (convolution or nn.Linear):
            refuse(name, f"a lora_{role} that is a {type(owner).__name__}", **expected)
        if owner.bias is not None:
            got = f"a lora_{role} with a bias (lora_bias=True), which most loaders of LoRA don't know"
            refuse(name, got, **expected)
    tensors: dict[str, Tensor] = {role: owner.weight for role, owner in owners.items()}
    if variant is not None:
        tensors["magnitude"] = layer.lora_magnitude_vector[adapter].weight
    K, N = layer.in_features, layer.out_features
    if convolution is not None:
        K *= layer.get_base_layer().weight[0, 0].numel()
        _check_convolution(name, layer.get_base_layer(), convolution, owners)
    return Fold(tensors, partial(_scaled, tensors["A"], tensors["B"], float(layer.scaling[adapter])), K, N)


def _of_delora(name: str, layer: Any, adapter: str) -> Fold:
    roles = ("delora_A", "delora_B", "delora_lambda", "delora_w_norm")
    A, B, lam, weight_norm = (getattr(layer, role)[adapter] for role in roles)
    if A.dim() == 2 and 0 < A.shape[0] != layer.r[adapter]:
        refuse(name, f"rank {layer.r[adapter]} with a delora_A of {list(A.shape)}", "set r to delora_A's rows")
    tensors = {"A": A, "B": B, "lambda": lam, "w_norm": weight_norm}

    def factors(acc: torch.dtype) -> tuple[Tensor, Tensor]:
        A_hat, B_hat, _, _ = ops.fold(A, B, Strength(lam, weight_norm, _PEFT_DELORA_EPS), Start(), acc, "eager")
        return A_hat, B_hat

    return Fold(tensors, factors, layer.in_features, layer.out_features)


def _check_convolution(name: str, base: Any, kind: type, owners: dict[str, Any]) -> None:
    """Refuse a convolution whose update is none of its weight: a reader adds B'A' to that."""
    got, of_base = None, type(base)
    if of_base is not kind:
        got = f"a base that is a {of_base.__name__}"
    elif base.groups != 1 or {*base.dilation} != {1} or base.padding_mode != "zeros":
        got = "a convolution with groups, dilation or another padding than zeros"
    elif owners["A"].kernel_size != base.kernel_size or {*owners["B"].kernel_size} != {1}:
        got = f"kernels of {owners['A'].kernel_size} and {owners['B'].kernel_size} on one of {base.kernel_size}"
    if got is not None:
        remedy = "adapt other layers, or save this adapter as it is (save_lora_adapter, save_pretrained)"
        refuse(name, f"{got}, whose adapter is no update of its weight", remedy, _ON_CONVOLUTION)


def _scaled(A: Tensor, B: Tensor, scale: float, acc: torch.dtype) -> tuple[Tensor, Tensor]:
    return A.flatten(1).to(acc), B.flatten(1).to(acc) * scale
