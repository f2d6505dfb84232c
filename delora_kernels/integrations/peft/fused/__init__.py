"""PEFT's eager adapter layers swapped for fused ones, in place.

A layer keeps its identity: only its class changes, to a subclass whose forward calls the fused
function. Parameters, names, state dict, config and every PEFT method stay. At each call the
parameters are looked up through the modules that own them, and whatever is not provably a plain
LoRA, DoRA or DeLoRA linear runs PEFT's own forward.

    swap.py          accelerate() and restore(): which layers there are
    layers.py        the fused classes, and what a call of one does
    plan.py          what computes a layer as it stands now, or why it must be PEFT's own forward
    verdicts.py      which kinds of layers of the installed PEFT can be fused at all
    layer_check.py   finds that out for a PEFT that no test ran with
    experts.py       adapters on the experts of expert models: the fused wrapper, and its plan
    experts_known.py which experts modules compute what is fused
    experts_block.py the experts on their tokens, with adapters
    expected_calls.py the calls that a layer will make
    proving.py       their kernels prove themselves before training
    bypassed.py      layers that their parents compute past their forward
    report.py        what accelerate() returns
"""

from delora_kernels.integrations.peft.fused.layer_check import judge_installed_peft
from delora_kernels.integrations.peft.fused.swap import accelerate, restore, warmup

__all__ = ["accelerate", "restore", "warmup"]

judge_installed_peft()  # now, not in the middle of what torch.compile traces
