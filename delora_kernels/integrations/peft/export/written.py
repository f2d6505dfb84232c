"""A tensor as export_lora writes it: checked for what its dtype can't hold, on the CPU, in memory
of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from delora_kernels import checks
from delora_kernels.integrations.peft.export.refusal import FUNCTION, refuse


def written(name: str, role: str, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return one factor as it is written."""
    if not factor.isfinite().all():
        refuse(name, f"NaN or Inf in its {role}'", "look for NaN, Inf or huge values in the adapter")
    written = _copied(factor, dtype)
    if not written.isfinite().all():
        got = f"values up to {factor.abs().max().item():.3g} in its {role}'"
        expected = f"within the range of {written.dtype}"
        raise checks.fail(ValueError, FUNCTION, f"layer {name!r}", expected, got, "pass dtype=torch.float32")
    return written


def _copied(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """Return a contiguous copy on the CPU that shares memory with nothing, as safetensors
    wants it.
    """
    wanted = tensor.dtype if dtype is None else dtype
    return tensor.detach().to("cpu", wanted, copy=True, memory_format=torch.contiguous_format)


def carried(name: str, tensor: Any) -> Tensor:
    """Return a tensor that was trained beside the adapters as it is written."""
    if type(tensor) not in (Tensor, nn.Parameter) or tensor.is_meta:
        got = "a meta tensor" if type(tensor) in (Tensor, nn.Parameter) else f"a {type(tensor).__name__}"
        raise checks.fail(ValueError, FUNCTION, repr(name), "a whole local tensor", got, "load or gather it first")
    return _copied(tensor)
