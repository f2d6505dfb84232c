"""What eager PyTorch computes for a method in the dtypes a user has: the yardstick of every
tolerance.

Where all tensors share a dtype this is the reference in that dtype. With wider adapters on a
narrower base it is what PEFT's layers do: the frozen GEMM in the base's dtype, the branch on a wide
copy of x in the adapters' dtype, and one rounding of their sum. Roundings that PEFT adds to these
(DeLoRA's branch before the sum, DoRA's bias taken off the base and put back) are left out: the
yardstick is not made longer by them.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

from delora_kernels import reference

BASE = ("x", "weight", "bias")
"""Arguments in the base's dtype; every other tensor is the adapter's."""


def adapter_dtype(arguments: Mapping[str, Any]) -> torch.dtype:
    """Return the dtype of the adapter's tensors."""
    return next(arguments[name].dtype for name in ("A", "u", "u_out") if name in arguments)


def eager(function: str, **arguments: Any) -> Any:
    """Compute the method in plain torch, differentiable by autograd.

    Args:
        function: Name of the function in `delora_kernels.reference`.
        **arguments: Its arguments; x, weight and bias may be narrower than the rest.

    Returns:
        y, `[..., N]`, in x's dtype; of a mixture with its statistics.
    """
    if arguments["x"].dtype == adapter_dtype(arguments):
        return getattr(reference, function)(**arguments)
    if function == "dora_linear":
        return _mixed_dora(**arguments)
    if function.startswith("grouped"):
        return _mixed_grouped(function, **arguments)
    if function.startswith("ether"):
        return _mixed_ether(function, **arguments)
    return _mixed_additive(function, **arguments)


def materialised(function: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, **vectors: Any) -> Tensor:
    """x W'ᵀ + bias of ETHER's functions, W' made in the vectors' dtype and rounded to x's: sums in
    another order.
    """
    adapted = getattr(reference, function.replace("linear", "weight"))
    return linear(x, adapted(weight.to(adapter_dtype(vectors)), **vectors).to(x.dtype), bias)


def _mixed_additive(function: str, x: Tensor, weight: Tensor, bias: Tensor | None = None, **branch: Any) -> Any:
    """x Wᵀ + bias in the base's dtype + the branch, which is the reference with W = 0, in the
    adapters'.
    """
    wide = branch["A"].dtype
    magnitude = branch.pop("magnitude", None)
    added = getattr(reference, function)(x.to(wide), torch.zeros_like(weight, dtype=wide), **branch)
    if magnitude is not None:
        return _rescaled_mixture(x, weight, bias, added, magnitude, branch)
    if isinstance(added, Tensor):
        return (linear(x, weight, bias) + added).to(x.dtype)
    update, stats = added
    return (linear(x, weight, bias) + update).to(x.dtype), stats


def _rescaled_mixture(
    x: Tensor, weight: Tensor, bias: Tensor | None, added: Any, magnitude: Tensor, branch: Mapping[str, Any]
) -> Any:
    """Compute base + (c − 1) ⊙ base + c ⊙ branch + bias of a mixture, with its statistics."""
    wide, names = branch["A"].dtype, ("A", "B", "scale", "frozen_A", "frozen_B", "residual")
    identity = torch.eye(weight.shape[1], dtype=wide, device=x.device)
    E = len(branch["B"])
    mixture: dict[str, Any] = {name: branch[name] for name in names if name in branch}
    mixture["gates"] = identity.new_full((len(identity), E), 1 / E)
    with torch.no_grad():
        mean = reference.moe_lora_linear(identity, weight.to(wide), **mixture)[0].t()
    base, (update, stats) = linear(x, weight), added
    c = magnitude / mean.norm(dim=1)
    y = base + (c - 1) * base + c * update
    return (y if bias is None else y + bias).to(x.dtype), stats


def _mixed_grouped(
    function: str, x: Tensor, weight: Tensor, offsets: Tensor, bias: Tensor | None = None, **branch: Any
) -> Tensor:
    """Compute the same expert by expert: the frozen GEMMs in the base's dtype."""
    wide = branch["A"].dtype
    call = getattr(reference, function)
    if function == "grouped_dora_linear":
        parts, begin, mask = [], 0, branch.pop("dropout_mask", None)
        scale = branch.pop("scale")
        for e, end in enumerate(offsets.tolist()):
            rows, begin = slice(begin, end), end
            own = {name: value[e] for name, value in branch.items()}
            seen = None if mask is None else mask[rows]
            rest = {"scale": scale, "dropout": "branch", "dropout_mask": seen}
            parts.append(_mixed_dora(x[rows], weight[e], None if bias is None else bias[e], **own, **rest))
        return torch.cat([*parts, x.new_zeros(len(x) - begin, weight.shape[1])])
    added = call(x.to(wide), torch.zeros_like(weight, dtype=wide), offsets=offsets, **branch)
    without: dict[str, Any] = {name: torch.zeros_like(branch[name], dtype=x.dtype) for name in ("A", "B")}
    return (reference.grouped_lora_linear(x, weight, offsets=offsets, bias=bias, **without) + added).to(x.dtype)


def _mixed_dora(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, magnitude: Tensor, dropout: str = "peft", **branch: Any
) -> Tensor:
    """Compute base + (c − 1) ⊙ base + c ⊙ branch + bias; PEFT's dropout: the second base sees the
    dropped x, in A's dtype.
    """
    A, B, scale = branch["A"], branch["B"], branch.get("scale", 1.0)
    wide, mask = A.dtype, branch.get("dropout_mask")
    c = magnitude / (weight.to(wide) + scale * B @ A).norm(dim=1).detach()
    base = rescaled = linear(x, weight)
    dropped = x.to(wide) if mask is None else x.to(wide) * mask
    if mask is not None and dropout == "peft":
        rescaled = linear(dropped, weight.to(wide))
    y = base + (c - 1) * rescaled + c * (scale * (dropped @ A.T) @ B.T)
    return (y if bias is None else y + bias).to(x.dtype)


def _mixed_ether(
    function: str,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    blocks: str = "paper",
    **vectors: Tensor,
) -> Tensor:
    """x reflected in the vectors' dtype and rounded to its own, the frozen GEMM, its output
    reflected likewise.

    PEFT has no ETHER; this is how its OFT rotates activations in a wider dtype than the base's.
    """
    call, wide = getattr(reference, function), adapter_dtype(vectors)
    into = {name: value for name, value in vectors.items() if not name.endswith("_out")}
    out_of = {name: value for name, value in vectors.items() if name.endswith("_out")}
    inner_bias = None if out_of else bias
    if blocks == "official":
        reflected = getattr(reference, function.replace("linear", "weight"))(weight.to(wide), **into, blocks=blocks)
        z = linear(x, reflected.to(x.dtype), inner_bias)
    else:
        z = linear(_reflected(call, x, into, wide), weight, inner_bias)
    if not out_of:
        return z
    y = _reflected(call, z, {name.removesuffix("_out"): value for name, value in out_of.items()}, wide)
    return y if bias is None else y + bias


def _reflected(call: Any, x: Tensor, vectors: Mapping[str, Tensor], wide: torch.dtype) -> Tensor:
    """x H, the layer whose weight is the identity."""
    if not vectors:
        return x
    reflected: Tensor = call(x.to(wide), torch.eye(x.shape[1], dtype=wide, device=x.device), **vectors)
    return reflected.to(x.dtype)
