"""FullyShardedDataParallel around the whole model, around blocks, and by PEFT's policy, which wraps
trained leaves.
"""

from typing import Any

import torch
from peft.utils.other import fsdp_auto_wrap_policy
from torch.distributed.algorithms._checkpoint import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
from torch.distributed.fsdp import ShardingStrategy
from torch.distributed.fsdp.wrap import ModuleWrapPolicy

import delora_kernels as dk
from distributed.blocks import Block, batch, blocks, half
from distributed.passes import (
    assert_close,
    backward,
    fused_calls,
    gradients,
    optimizer_step,
    parameters,
    single_process,
)

POLICIES: dict[str, Any] = {
    "whole": lambda made: None,
    "blocks": lambda made: ModuleWrapPolicy({Block}),
    "peft": lambda made: fsdp_auto_wrap_policy(made.base_model.model),
}


def train(
    rank: int,
    method: str,
    seed: int,
    before: bool,
    units: str,
    use_orig_params: bool = True,
    strategy: str = "FULL_SHARD",
    checkpointed: bool = False,
) -> int:
    """The number of fused calls of a pass, accelerated before or after wrapping; the numbers are
    checked here.
    """
    y, grads, stepped = single_process(method, seed)
    made = blocks(method, seed)
    if before:
        dk.accelerate(made, strict=True)
    wrapped = FSDP(
        made,
        auto_wrap_policy=POLICIES[units](made),
        device_id=torch.device("cpu"),
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
    )
    if checkpointed:
        checkpoint_wrapper.apply_activation_checkpointing(wrapped, check_fn=lambda module: isinstance(module, Block))
    if not before:
        # a layer may lie whole on one rank and be spread elsewhere: no rank may raise alone
        report = dk.accelerate(wrapped, strict=units != "peft")
        assert len(report.layers) == 6
        assert units == "peft" or not report.declined
    with fused_calls() as calls:
        assert_close(backward(wrapped, half(batch(seed), rank)), {"y": half(y, rank)})
    if use_orig_params:  # else the flat parameter has the gradient, and the step below shows it
        with FSDP.summon_full_params(wrapped, with_grads=True):
            assert_close(gradients(wrapped), grads)
    optimizer_step(wrapped)
    with FSDP.summon_full_params(wrapped):
        assert_close(parameters(wrapped), stepped)
    return len(calls)
