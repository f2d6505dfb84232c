"""PEFT's LoRA and DoRA on convolutions: the base and lora_A run as they are, the rest in one pass.

    y = base(x) + scale · (B lora_A(drop(x)) + lora_bias)
    DoRA: c ⊙ (y − bias) + bias,   c = m / ‖W + scale · BA‖
    where it drops inputs, d = drop(x): y = base(x) + (c − 1) ⊙ (W d) + (c · scale) B lora_A(d)

The frozen convolution is the library's own (cuDNN, oneDNN), as a linear's GEMM is. PEFT makes a
token-sized tensor of the product with B, one of its multiple and one of the sum, and for DoRA four
more; here the sum is made in the convolution's output (but for a product beside a small one, on a
CPU), and DoRA's factor takes one. All of it is
plain torch, so that programs are compiled and exported, and gradients differentiated, as before.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from peft.tuners.lora.dora import DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer
from peft.tuners.lora.layer import Conv1d, Conv2d, Conv3d
from peft.tuners.lora.variants import DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant
from torch import Tensor, nn

from delora_kernels.bases.plain import NotLocal, parameter, why_not_local, why_not_plain
from delora_kernels.functional.channel_term import add_channel_term, along_channels, rescale_channels
from delora_kernels.integrations.peft.fused import verdicts
from delora_kernels.integrations.peft.fused.in_torch import (
    gives_fresh_output,
    plan_in_torch,
    run_in_torch,
    verdict_in_torch,
    why_not_scale,
)
from delora_kernels.integrations.peft.fused.plan import caches_dora_norms, why_not_class
from delora_kernels.integrations.peft.row_norm import constant_row_norm
from delora_kernels.integrations.peft.verdict import Verdict

CONVOLUTIONS = (Conv1d, Conv2d, Conv3d)
_TORCHS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
_VARIANTS = (DoraConv1dVariant, DoraConv2dVariant, DoraConv3dVariant)
_MAGNITUDES = (DoraConv1dLayer, DoraConv2dLayer, DoraConv3dLayer)
for _kind in (*CONVOLUTIONS, *_TORCHS, *_VARIANTS, *_MAGNITUDES):
    why_not_class(_kind)  # takes note of what the class defines


class FusedConv1d(Conv1d):
    """PEFT's LoRA or DoRA Conv1d with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, Conv1d.forward, x, args, kwargs)

    def _get_name(self) -> str:
        return "Conv1d"  # PEFT's layer status reads the type off the repr


class FusedConv2d(Conv2d):
    """PEFT's LoRA or DoRA Conv2d with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, Conv2d.forward, x, args, kwargs)

    def _get_name(self) -> str:
        return "Conv2d"


class FusedConv3d(Conv3d):
    """PEFT's LoRA or DoRA Conv3d with a fused forward."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return _forward(self, Conv3d.forward, x, args, kwargs)

    def _get_name(self) -> str:
        return "Conv3d"


class _Adapter(NamedTuple):
    """One active adapter: lora_A, its dropout, B [N, r / groups, 1, ...], its bias [N], the scale
    and the groups; of DoRA the magnitude [1, N, 1, ...].
    """

    A: nn.Module
    dropout: nn.Module
    B: Tensor
    bias: Tensor | None
    scale: float
    groups: int
    magnitude: Tensor | None


def verdict_of_convolution(layer: Any) -> Verdict:
    """Judge how a convolution with adapters runs as it stands."""
    return verdict_in_torch(plan_in_torch(layer, _peft_class(layer), layer.lora_A, _adapter, _run))


def _forward(layer: Any, peft_forward: Callable[..., Tensor], x: Tensor, args: Any, kwargs: dict[str, Any]) -> Tensor:
    return run_in_torch(layer, verdict_of_convolution(layer), _why_not_call, peft_forward, x, args, kwargs)


def _why_not_call(layer: Any, x: Tensor) -> str | None:
    if type(x) not in (Tensor, nn.Parameter):
        return f"its input is a {type(x).__name__}"
    return None if x.dim() == layer._kernel_dim else "its input has no batch dimension"


def _adapter(layer: Any, name: str) -> _Adapter | str:
    A, B, scale = layer.lora_A[name], layer.lora_B[name], layer.scaling[name]
    if type(B) not in _TORCHS:
        return _is_a("lora_B", B)
    reason: str | None = why_not_plain(B, "lora_B") or why_not_class(type(B)) or why_not_local(B.weight, "lora_B")
    if type(A) in _TORCHS:  # another one runs as it is
        reason = reason or why_not_local(A.weight, "lora_A")
    if B.bias is not None:
        reason = reason or why_not_local(B.bias, "lora_B's bias")
    reason = reason or why_not_scale(scale)
    if reason is not None:
        return reason
    if B.weight.shape[2:].numel() != 1 or {*B.stride} != {1} or {*B.padding} != {0}:
        return "its lora_B is more than a product"
    magnitude = None if layer.lora_variant.get(name) is None else _magnitude(layer, name)
    if isinstance(magnitude, str):
        return magnitude
    return _Adapter(A, layer.lora_dropout[name], B.weight, B.bias, float(scale), B.groups, magnitude)


def _magnitude(layer: Any, name: str) -> Tensor | str:
    """Read DoRA's magnitude, or say why PEFT's own forward must."""
    variant, base, place = layer.lora_variant[name], layer.base_layer, CONVOLUTIONS.index(_peft_class(layer))
    if verdicts.reasons["dora"] is not None:
        return verdicts.reasons["dora"]
    if type(variant) is not _VARIANTS[place]:
        return f"its LoRA variant {type(variant).__name__} is not fused"
    owner = layer.lora_magnitude_vector[name]
    if type(owner) is not _MAGNITUDES[place]:
        return f"its magnitude is a {type(owner).__name__}"
    if type(base) is not _TORCHS[place]:
        return f"its base layer is a {type(base).__name__}, whose weight DoRA reads"
    if caches_dora_norms(layer):
        return "PEFT's cache of DoRA norms is on"
    if layer.lora_B[name].groups != 1:
        return "DoRA on a convolution with groups, whose norm PEFT takes in its own way"
    if layer.lora_B[name].bias is not None:
        return "DoRA whose lora_B has a bias"
    A = layer.lora_A[name]
    if type(A) is not _TORCHS[place]:
        return _is_a("lora_A", A)
    tensors = {"magnitude": owner.weight, "base weight": base.weight, "lora_A": A.weight}
    reason: str | None = why_not_class(type(variant)) or why_not_class(type(owner)) or why_not_plain(owner, "magnitude")
    for role, tensor in tensors.items():
        reason = reason or why_not_local(tensor, role)
    return owner.weight if reason is None else reason


def _is_a(role: str, part: nn.Module) -> str | NotLocal:
    return f"its {role} is a {type(part).__name__}"


def _peft_class(layer: Any) -> Any:
    return next(each for each in CONVOLUTIONS if isinstance(layer, each))


def _run(layer: Any, adapters: list[_Adapter], x: Tensor) -> Tensor:
    """Run the adapters one after the other, as PEFT does: DoRA rescales what the ones before it
    gave.
    """
    base = layer.base_layer
    y: Tensor = base(x)
    dtype, fresh = y.dtype, gives_fresh_output(base, _TORCHS)
    for adapter in adapters:
        x = layer._cast_input_dtype(x, parameter(adapter.A, "weight").dtype)
        if adapter.magnitude is None:
            h = adapter.A(adapter.dropout(x))
            y = add_channel_term(y, h, adapter.B.flatten(1), adapter.scale, adapter.groups, fresh)
            if adapter.bias is not None:
                y = y + along_channels(adapter.scale * adapter.bias, y)
        else:
            y = _with_dora(layer, adapter, adapter.magnitude.flatten(), x, y, fresh)
        fresh = True  # what was made here nobody else has
    return y.to(dtype)


def _with_dora(layer: Any, adapter: _Adapter, magnitude: Tensor, x: Tensor, y: Tensor, fresh: bool) -> Tensor:
    """Add one DoRA adapter to y."""
    base, A, B, scale = layer.base_layer, adapter.A, adapter.B, adapter.scale
    c = magnitude / constant_row_norm(base.weight, parameter(A, "weight"), B, scale)
    if isinstance(adapter.dropout, nn.Identity) or not layer.training:  # PEFT asks the layer, not its dropout
        return rescale_channels(add_channel_term(y, A(x), B.flatten(1), scale, fresh=fresh), c, base.bias)
    x = adapter.dropout(x)
    dropped = layer.conv_fn(x, base.weight, None, base.stride, base.padding, base.dilation, base.groups)
    y = torch.addcmul(y, along_channels(c - 1, y), dropped)
    return add_channel_term(y, A(x), (c[:, None] * B.flatten(1)).to(B.dtype), scale, fresh=True)
