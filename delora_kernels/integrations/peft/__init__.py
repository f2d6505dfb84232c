"""PEFT: swap its eager adapter layers for fused ones, in place.

A layer keeps its identity: only its class changes, to a subclass whose forward calls the fused function. Parameters,
names, state dict, config and every PEFT method stay. At each call the parameters are looked up through the modules that
own them, and whatever is not provably a plain LoRA, DoRA or DeLoRA linear runs PEFT's own forward.

    swap.py     accelerate() and restore(): which layers there are, and the report
    layers.py   the fused classes, and what a call of one does
    plan.py     what computes a layer as it stands now, or why it must be PEFT's own forward
"""

from delora_kernels.integrations.peft.swap import accelerate, restore
from delora_kernels.integrations.supported import why_not

__all__ = ["accelerate", "restore"]

why_not("lora")  # an untested PEFT is checked now, not in the middle of what torch.compile traces
