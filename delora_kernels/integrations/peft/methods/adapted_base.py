"""What the library's own layers ask of the linear that they stand around, dense or stored in few
bits: its size, where its adapters belong, and for starts its weight.
"""

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from delora_kernels import checks
from delora_kernels.bases.read import base_in, stored_form
from delora_kernels.bases.stored import StoredBase, dotted_name

_UNREADABLE = {"bitsandbytes.nn.modules.Linear8bitLt"}
"""Stored linears whose own forward alone knows what they compute."""


def can_be_adapted(base: nn.Module) -> bool:
    """Whether the own methods adapt a module: a linear with a float weight, or a stored one."""
    return (isinstance(base, (nn.Linear, Conv1D)) and is_float(base.weight)) or is_stored(base)


def is_stored(base: nn.Module) -> bool:
    """Whether a linear holds its weight in another form than a dense tensor."""
    return stored_form(base) is not None or dotted_name(type(base)) in _UNREADABLE


def is_float(weight: Any) -> bool:
    """Whether a weight is of floats: a quantised tensor's class may call itself float32; torch's
    own shards are.
    """
    plain = type(weight) in checks.PLAIN or type(weight).__module__.startswith("torch.")
    return plain and weight.dtype in checks.FLOATS


def shape_of(base: Any) -> tuple[int, int]:
    """Return N and K."""
    if is_stored(base):
        return base.out_features, base.in_features
    N, K = weight_of(base).shape
    return N, K


def device_of(base: nn.Module) -> torch.device:
    """Return where the weight lives."""
    return next(base.parameters()).device


def dtype_of(base: Any) -> torch.dtype:
    """Return the dtype of an adapter's new parameters: the weight's, of a stored one float32."""
    return torch.float32 if is_stored(base) else base.weight.dtype


def weight_of(base: Any) -> Tensor:
    """Return W [N, K]; of a stored one what it is dequantised to, in float32, which nobody keeps.

    Raises:
        TypeError: it can't be read; the text says why.
    """
    weight: Tensor
    if not is_stored(base):
        weight = base.weight.detach()
        return weight.t() if type(base).__name__ == "Conv1D" else weight
    found = base_in(base)
    if isinstance(found, StoredBase):
        with torch.inference_mode(False), torch.no_grad():
            return found.dense(torch.float32)
    raise TypeError(
        f"the weight of a {type(base).__name__} is needed, and can't be read: {found}; take a start that needs none "
        "(GoatConfig(init_weights=False), not normalised, no use_dora), or load the model in 16 bits"
    )
