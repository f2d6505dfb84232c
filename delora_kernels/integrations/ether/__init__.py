"""ETHER and ETHER+ for people who use PEFT: importing this makes them methods of PEFT.

config.py        EtherConfig, EtherPlusConfig
model.py         EtherModel, EtherPlusModel, PEFT's tuners
layer.py         PeftEtherLinear, PeftEtherPlusLinear: one linear with its adapters
"""

from delora_kernels.integrations import peft_method
from delora_kernels.integrations.ether.config import EtherConfig, EtherPlusConfig
from delora_kernels.integrations.ether.layer import PeftEtherLinear, PeftEtherPlusLinear
from delora_kernels.integrations.ether.model import EtherModel, EtherPlusModel

__all__ = ["EtherConfig", "EtherModel", "EtherPlusConfig", "EtherPlusModel", "PeftEtherLinear", "PeftEtherPlusLinear"]

peft_method.register("ether", EtherConfig, EtherModel)
peft_method.register("ether_plus", EtherPlusConfig, EtherPlusModel)
