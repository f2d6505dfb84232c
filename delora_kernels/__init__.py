"""Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA in less time and memory than eager layers.

import delora_kernels as dk

dk.accelerate(peft_model)                     # swap PEFT's eager adapter layers for fused ones, in place
dk.export_lora(peft_model, "folder")          # a DeLoRA adapter as a standard LoRA adapter
y = dk.functional.lora_linear(x, W, A, B)     # the same as functions; delora_kernels.nn has them as modules
"""

import importlib
from typing import TYPE_CHECKING, Any

from delora_kernels import dispatch, functional, nn, reference, renamed
from delora_kernels.diagnostics import proof
from delora_kernels.diagnostics.explain import explain
from delora_kernels.dispatch import use_backend
from delora_kernels.routing import expert_report, watch_experts
from delora_kernels.version import __version__

if TYPE_CHECKING:
    from delora_kernels.integrations.peft.export.export_lora import export_lora
    from delora_kernels.integrations.peft.fused import accelerate, restore
    from delora_kernels.integrations.peft.methods.ether import EtherConfig, EtherPlusConfig
    from delora_kernels.integrations.peft.methods.goat import GoatConfig, import_goat, merge_mean_gate
    from delora_kernels.integrations.peft.methods.register import register_peft_methods
    from delora_kernels.integrations.transformers import AccelerateCallback, ExpertCallback

dispatch.unproved = proof.why_not
renamed.install()

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
    "accelerate": "peft.fused",
    "restore": "peft.fused",
    "export_lora": "peft.export.export_lora",
    "AccelerateCallback": "transformers",
    "ExpertCallback": "transformers",
    "EtherConfig": "peft.methods.ether",
    "EtherPlusConfig": "peft.methods.ether",
    "GoatConfig": "peft.methods.goat",
    "import_goat": "peft.methods.goat",
    "merge_mean_gate": "peft.methods.goat",
    "register_peft_methods": "peft.methods.register",
}
"""Names that import PEFT, and the module of delora_kernels.integrations that has them."""


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


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
