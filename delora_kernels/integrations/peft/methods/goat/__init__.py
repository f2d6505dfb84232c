"""GOAT for people who use PEFT: importing this makes it a method of PEFT.

config.py        GoatConfig
model.py         GoatModel, PEFT's tuner
layer.py         PeftGoatLinear: one linear with its adapters
start.py         the start that a layer subtracts: saved, or made again and checked
magnitude.py     DoRA over the mixture: what rescales a layer's outputs
"""

from delora_kernels.integrations.peft.methods import register
from delora_kernels.integrations.peft.methods.goat.config import GoatConfig
from delora_kernels.integrations.peft.methods.goat.layer import PeftGoatLinear
from delora_kernels.integrations.peft.methods.goat.mean_gate import MeanGateReport, merge_mean_gate
from delora_kernels.integrations.peft.methods.goat.model import GoatModel
from delora_kernels.integrations.peft.methods.goat.source_checkpoint import import_goat

__all__ = ["GoatConfig", "GoatModel", "MeanGateReport", "PeftGoatLinear", "import_goat", "merge_mean_gate"]

register.register("goat", GoatConfig, GoatModel)
