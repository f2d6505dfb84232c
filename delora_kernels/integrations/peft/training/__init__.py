"""Does it train? What the adapters of a PEFT model got of gradients and steps, and what is wrong.

report.py    training_report, and what it says
watch.py     watch_training: counts tokens, gradients and steps while a model trains
packing.py   whether a model computes with its experts' factors as PEFT packs them
"""

from delora_kernels.integrations.peft.training.report import training_report
from delora_kernels.integrations.peft.training.watch import watch_training

__all__ = ["training_report", "watch_training"]
