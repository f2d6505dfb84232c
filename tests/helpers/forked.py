"""Processes forked from a server that has imported torch, PEFT and Transformers once: each costs a
second, not ten.
"""

import multiprocessing
import os
from typing import Any

_IMPORTED = ["torch.distributed.fsdp", "torch.distributed.tensor.parallel", "peft", "accelerate"]
_IMPORTED += ["transformers.models.llama.modeling_llama", "transformers.trainer"]
_IMPORTED += ["delora_kernels.integrations.peft.fused", "delora_kernels.nn"]  # the package alone loads neither


def context() -> Any:
    """The multiprocessing context; where there is no fork, its processes import everything
    themselves.
    """
    if not hasattr(os, "fork"):
        return multiprocessing.get_context("spawn")
    made = multiprocessing.get_context("forkserver")
    made.set_forkserver_preload(_IMPORTED)
    return made
