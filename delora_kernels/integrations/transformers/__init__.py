"""Transformers' Trainer: callbacks that accelerate its model, that say whether its adapters train,
how far its weights move, and how a mixture uses its experts; its models' experts in 4 bits.
"""

from delora_kernels.integrations.transformers.accelerate_callback import AccelerateCallback
from delora_kernels.integrations.transformers.expert_callback import ExpertCallback
from delora_kernels.integrations.transformers.experts_in_4bit import QuantizedExperts, quantize_experts
from delora_kernels.integrations.transformers.experts_while_loading import load_with_quantized_experts
from delora_kernels.integrations.transformers.training_report_callback import TrainingReportCallback
from delora_kernels.integrations.transformers.weight_changes_callback import WeightChangesCallback

__all__ = [
    "AccelerateCallback",
    "ExpertCallback",
    "QuantizedExperts",
    "TrainingReportCallback",
    "WeightChangesCallback",
    "load_with_quantized_experts",
    "quantize_experts",
]
