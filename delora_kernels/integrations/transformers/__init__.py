"""Transformers' Trainer: callbacks that accelerate its model, and that report how a mixture uses
its experts.
"""

from delora_kernels.integrations.transformers.accelerate_callback import AccelerateCallback
from delora_kernels.integrations.transformers.expert_callback import ExpertCallback

__all__ = ["AccelerateCallback", "ExpertCallback"]
