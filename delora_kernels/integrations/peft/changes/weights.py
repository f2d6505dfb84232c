"""W of any module as a matrix [N, K], one row for each output feature, and the names under which a
snapshot knows it.

nn.Linear's weight is that matrix; of Transformers' Conv1D and of an embedding it is the transpose
(an embedding's outputs are the dimensions of its vectors), of a convolution everything but the
output channel flattened. So PEFT's DoRA sees them when it takes norms.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from transformers.pytorch_utils import Conv1D

from delora_kernels.bases.plain import parameter, why_not_local
from delora_kernels.bases.read import base_in, stored_form
from delora_kernels.bases.stored import StoredBase

KNOWN = (nn.Linear, Conv1D, nn.Embedding, _ConvNd)

_WRAPPERS = {
    "base_layer",
    "original_module",
    "_orig_mod",
    "_fsdp_wrapped_module",
    "_checkpoint_wrapped_module",
}
"""Parts of a name that wrappers add to it."""


def is_known(module: nn.Module) -> bool:
    """Whether it is told by a module's class which axis of its weight is its outputs'."""
    return isinstance(module, KNOWN) and not isinstance(module, _ConvTransposeNd)


def matrix_of(module: nn.Module, weight: Any = None) -> Tensor | str:
    """Return the weight of a module as [N, K], of a stored one what it is dequantised to, which
    nobody keeps; or why there is none.

    Args:
        module: The module, whose class says how it holds its weight.
        weight: Another tensor to be seen as its weight; None: its own.
    """
    if weight is None and stored_form(module) is not None:
        base = base_in(module)
        if isinstance(base, StoredBase):
            with torch.inference_mode(False), torch.no_grad():
                return base.dense(torch.float32)
        return base if isinstance(base, str) else base.weight.detach()
    if not is_known(module):
        return f"it is unknown which axis of a {type(module).__name__}'s weight is its outputs'"
    weight = parameter(module, "weight") if weight is None else weight
    reason = why_not_local(weight, "weight")
    if reason is not None:
        return reason
    weight = weight.detach()
    if isinstance(module, (Conv1D, nn.Embedding)):
        return weight.t() if weight.dim() == 2 else f"its weight is {weight.dim()}-dimensional"
    return weight.flatten(1) if weight.dim() > 1 else f"its weight is {weight.dim()}-dimensional"


def base_name(name: str) -> str:
    """Return the name that a module or tensor has in the model without adapters and wrappers."""
    parts = [part for part in name.split(".") if part not in _WRAPPERS]
    if parts[:1] == ["module"]:  # DistributedDataParallel
        parts = parts[1:]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    return ".".join(parts)
