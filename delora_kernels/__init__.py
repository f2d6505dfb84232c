"""Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA in less time and memory than eager layers.

import delora_kernels as dk

dk.accelerate(peft_model)                     # swap PEFT's eager adapter layers for fused ones, in place
dk.export_lora(peft_model, "folder")          # a DeLoRA adapter as a standard LoRA adapter
y = dk.functional.lora_linear(x, W, A, B)     # the same as functions; delora_kernels.nn has them as modules
"""

import importlib
from typing import TYPE_CHECKING, Any

from delora_kernels import functional, nn, reference
from delora_kernels.backends import use_backend
from delora_kernels.expert_use import expert_report
from delora_kernels.expert_watch import watch_experts
from delora_kernels.explanation import explain
from delora_kernels.version import __version__

if TYPE_CHECKING:
    from delora_kernels.integrations.ether import EtherConfig, EtherPlusConfig
    from delora_kernels.integrations.expert_callback import ExpertCallback
    from delora_kernels.integrations.export import export_lora
    from delora_kernels.integrations.goat import GoatConfig, import_goat, merge_mean_gate
    from delora_kernels.integrations.peft import accelerate, restore
    from delora_kernels.integrations.peft_method import register_peft_methods
    from delora_kernels.integrations.transformers import AccelerateCallback

__all__ = [
    "AccelerateCallback",
    "EtherConfig",
    "EtherPlusConfig",
    "ExpertCallback",
    "GoatConfig",
    "__version__",
    "accelerate",
    "expert_report",
    "explain",
    "export_lora",
    "functional",
    "import_goat",
    "merge_mean_gate",
    "nn",
    "reference",
    "register_peft_methods",
    "restore",
    "use_backend",
    "watch_experts",
]

_LAZY = {
    "accelerate": "peft",
    "restore": "peft",
    "export_lora": "export",
    "AccelerateCallback": "transformers",
    "ExpertCallback": "expert_callback",
    "EtherConfig": "ether",
    "EtherPlusConfig": "ether",
    "GoatConfig": "goat",
    "import_goat": "goat",
    "merge_mean_gate": "goat",
    "register_peft_methods": "peft_method",
}
"""Names that import PEFT, and the module of delora_kernels.integrations that has them."""


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"delora_kernels.integrations.{_LAZY[name]}")
    except ImportError as error:
        raise ImportError(
            f"delora_kernels.{name} needs PEFT and Transformers: pip install 'delora-kernels[peft]' ({error})"
        ) from error
    return getattr(module, name)
