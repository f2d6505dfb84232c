"""Fused low-rank adapters for PyTorch: LoRA, DoRA and DeLoRA in less time and memory than eager
layers.

import delora_kernels as dk

dk.accelerate(peft_model)  # swap PEFT's eager adapter layers for fused ones, in place
dk.export_lora(peft_model, "folder")          # a DeLoRA adapter as a standard LoRA adapter
# the same as functions; delora_kernels.nn has them as modules
y = dk.functional.lora_linear(x, W, A, B)
"""

import importlib
import importlib.util
from typing import TYPE_CHECKING, Any

from delora_kernels import dispatch, renamed
from delora_kernels import ops as ops  # registers them: a saved program that calls them needs this import alone
from delora_kernels.diagnostics import proof
from delora_kernels.dispatch import use_backend
from delora_kernels.version import __version__

if TYPE_CHECKING:
    from delora_kernels import bases, flops, functional, nn, reference
    from delora_kernels.diagnostics.explain import explain
    from delora_kernels.integrations.peft.before_loading import can_accelerate
    from delora_kernels.integrations.peft.changes import weight_changes
    from delora_kernels.integrations.peft.compare import compare
    from delora_kernels.integrations.peft.delora_on_stored_bases import allow_delora_on_stored_bases
    from delora_kernels.integrations.peft.export.export_lora import export_lora
    from delora_kernels.integrations.peft.fused import accelerate, restore, warmup
    from delora_kernels.integrations.peft.methods.ether import EtherConfig, EtherPlusConfig
    from delora_kernels.integrations.peft.methods.goat import GoatConfig, import_goat, merge_mean_gate
    from delora_kernels.integrations.peft.methods.register import register_peft_methods
    from delora_kernels.integrations.peft.training import training_report, watch_training
    from delora_kernels.integrations.transformers import (
        AccelerateCallback,
        ExpertCallback,
        TrainingReportCallback,
        WeightChangesCallback,
        load_with_quantized_experts,
        quantize_experts,
    )
    from delora_kernels.routing import expert_report, watch_experts

dispatch.unproved = proof.why_not
renamed.install()

__all__ = [
    "AccelerateCallback",
    "EtherConfig",
    "EtherPlusConfig",
    "ExpertCallback",
    "GoatConfig",
    "TrainingReportCallback",
    "WeightChangesCallback",
    "__version__",
    "accelerate",
    "allow_delora_on_stored_bases",
    "bases",
    "can_accelerate",
    "compare",
    "expert_report",
    "explain",
    "export_lora",
    "flops",
    "functional",
    "import_goat",
    "load_with_quantized_experts",
    "merge_mean_gate",
    "nn",
    "quantize_experts",
    "reference",
    "register_peft_methods",
    "restore",
    "training_report",
    "use_backend",
    "warmup",
    "watch_experts",
    "watch_training",
    "weight_changes",
]

_MODULES = ("bases", "flops", "functional", "nn", "reference")
"""Modules that are imported when they are asked for: importing the package is to cost little."""

_OURS = {
    "expert_report": "routing",
    "explain": "diagnostics.explain",
    "watch_experts": "routing",
}
"""Names that are imported when they are asked for, and the module of delora_kernels that has them.
"""

_NEED_PEFT = {
    "accelerate": "peft.fused",
    "allow_delora_on_stored_bases": "peft.delora_on_stored_bases",
    "can_accelerate": "peft.before_loading",
    "compare": "peft.compare",
    "restore": "peft.fused",
    "export_lora": "peft.export.export_lora",
    "AccelerateCallback": "transformers",
    "ExpertCallback": "transformers",
    "TrainingReportCallback": "transformers",
    "WeightChangesCallback": "transformers",
    "EtherConfig": "peft.methods.ether",
    "EtherPlusConfig": "peft.methods.ether",
    "GoatConfig": "peft.methods.goat",
    "import_goat": "peft.methods.goat",
    "load_with_quantized_experts": "transformers",
    "merge_mean_gate": "peft.methods.goat",
    "quantize_experts": "transformers",
    "register_peft_methods": "peft.methods.register",
    "training_report": "peft.training",
    "warmup": "peft.fused",
    "watch_training": "peft.training",
    "weight_changes": "peft.changes",
}
"""Names that import PEFT, and the module of delora_kernels.integrations that has them."""


def __dir__() -> list[str]:
    """List the public names; those that need PEFT where it is installed, for help() asks for
    each.
    """
    here = set(__all__) if _peft_is_installed() else set(__all__) - _NEED_PEFT.keys()
    return sorted(here | {name for name in globals() if name.startswith("__") and name.endswith("__")})


def _peft_is_installed() -> bool:
    try:
        return importlib.util.find_spec("peft") is not None
    except ValueError:  # somebody has put something else in its place
        return False


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    if name in _OURS:
        return getattr(importlib.import_module(f"{__name__}.{_OURS[name]}"), name)
    if name not in _NEED_PEFT:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    try:
        module = importlib.import_module(f"{__name__}.integrations.{_NEED_PEFT[name]}")
    except ImportError as error:
        raise ImportError(
            f"delora_kernels.{name} needs PEFT and Transformers: pip install 'delora-kernels[peft]' ({error})"
        ) from error
    return getattr(module, name)
