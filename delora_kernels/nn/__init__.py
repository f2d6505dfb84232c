"""Modules that own an adapter's parameters: initialisation, merging, state dict; the maths is in `functional`."""

from delora_kernels.nn.base import AdapterLinear
from delora_kernels.nn.delora import DeLoRALinear, lambda_parameter_groups
from delora_kernels.nn.dora import DoRALinear
from delora_kernels.nn.lora import LoRALinear

__all__ = ["AdapterLinear", "DeLoRALinear", "DoRALinear", "LoRALinear", "lambda_parameter_groups"]
