"""Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA in less time and memory than eager layers.

import delora_kernels as dk

dk.accelerate(peft_model)                     # swap PEFT's eager adapter layers for fused ones, in place
y = dk.functional.lora_linear(x, W, A, B)     # the same as functions; delora_kernels.nn has them as modules
"""

from typing import TYPE_CHECKING, Any

from delora_kernels import functional, nn, reference
from delora_kernels.backends import use_backend
from delora_kernels.explanation import explain
from delora_kernels.version import __version__

if TYPE_CHECKING:
    from delora_kernels.integrations.peft import accelerate, restore

__all__ = ["__version__", "accelerate", "explain", "functional", "nn", "reference", "restore", "use_backend"]


def __getattr__(name: str) -> Any:
    """accelerate and restore, loaded on first use: they import PEFT."""
    if name not in ("accelerate", "restore"):
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        from delora_kernels.integrations import peft
    except ImportError as error:
        raise ImportError(
            f"delora_kernels.{name} needs PEFT: pip install 'peft>=0.18' 'transformers>=4.56' ({error})"
        ) from error
    return getattr(peft, name)
