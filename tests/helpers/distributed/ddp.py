"""DistributedDataParallel: the gradients of every rank are those of one process on the whole
batch.
"""

from typing import Any

from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

import delora_kernels as dk
from distributed.blocks import Block, batch, blocks, half
from distributed.passes import assert_close, backward, check_step, fused_calls, gradients, single_process


def train(rank: int, method: str, seed: int, before: bool, options: dict[str, Any], checkpointed: bool) -> int:
    """The number of fused calls of a pass, accelerated before or after wrapping; the numbers are
    checked here.
    """
    y, grads, stepped = single_process(method, seed)
    x = half(batch(seed), rank)
    made = blocks(method, seed)
    if checkpointed:
        _checkpoint_blocks(made)
    if before:
        dk.accelerate(made, strict=True)
    wrapped = DistributedDataParallel(made, **options)
    if not before:
        dk.accelerate(wrapped, strict=True)
    with fused_calls() as calls:
        assert_close(backward(wrapped, x), {"y": half(y, rank)})
    assert_close(gradients(wrapped), grads)
    if not options.get("static_graph"):  # no_sync is another graph
        wrapped.zero_grad()
        first, second = x.chunk(2)
        with wrapped.no_sync():
            backward(wrapped, first, share=0.5)
        backward(wrapped, second, share=0.5)
        assert_close(gradients(wrapped), grads)
    check_step(wrapped, stepped)
    return len(calls)


def _checkpoint_blocks(made: nn.Module) -> None:
    for module in made.modules():
        if isinstance(module, Block):
            forward = module.forward
            module.forward = lambda x, forward=forward: checkpoint(forward, x, use_reentrant=False)
