"""ETHER and ETHER+ for people who use PEFT: importing this makes them methods of PEFT.

config.py        EtherConfig, EtherPlusConfig
model.py         EtherModel, EtherPlusModel, PEFT's tuners
layer.py         PeftEtherLinear, PeftEtherPlusLinear: one linear with its adapters
"""

from delora_kernels.integrations.peft.methods import register
from delora_kernels.integrations.peft.methods.ether.config import EtherConfig, EtherPlusConfig
from delora_kernels.integrations.peft.methods.ether.layer import PeftEtherLinear, PeftEtherPlusLinear
from delora_kernels.integrations.peft.methods.ether.model import EtherModel, EtherPlusModel

__all__ = ["EtherConfig", "EtherModel", "EtherPlusConfig", "EtherPlusModel", "PeftEtherLinear", "PeftEtherPlusLinear"]

register.register("ether", EtherConfig, EtherModel)
register.register("ether_plus", EtherPlusConfig, EtherPlusModel)
