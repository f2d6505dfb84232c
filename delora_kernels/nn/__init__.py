"""Modules that own an adapter's parameters: initialisation, merging, state dict; the maths is in
`functional`.
"""

from delora_kernels.nn.base import AdapterLinear, MergeableLinear
from delora_kernels.nn.conversion import convert
from delora_kernels.nn.delora import DeLoRALinear
from delora_kernels.nn.delora_moe import DeLoRAMoELinear
from delora_kernels.nn.dora import DoRALinear
from delora_kernels.nn.ether import EtherLinear, EtherPlusLinear
from delora_kernels.nn.ether_checkpoint import load_ether_checkpoint
from delora_kernels.nn.goat import GoatLinear
from delora_kernels.nn.grouped import GroupedDeLoRALinear, GroupedDoRALinear, GroupedLoRALinear
from delora_kernels.nn.lora import LoRALinear
from delora_kernels.nn.moe import MoELoRALinear, set_loss_scale
from delora_kernels.nn.parameter_groups import lambda_parameter_groups, router_parameter_groups
from delora_kernels.nn.siblings import adapted_linears

__all__ = [
    "AdapterLinear",
    "DeLoRALinear",
    "DeLoRAMoELinear",
    "DoRALinear",
    "EtherLinear",
    "EtherPlusLinear",
    "GoatLinear",
    "GroupedDeLoRALinear",
    "GroupedDoRALinear",
    "GroupedLoRALinear",
    "LoRALinear",
    "MergeableLinear",
    "MoELoRALinear",
    "adapted_linears",
    "convert",
    "lambda_parameter_groups",
    "load_ether_checkpoint",
    "router_parameter_groups",
    "set_loss_scale",
]
