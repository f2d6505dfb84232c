"""Hugging Face accelerate's Accelerator, which wraps the model, shares out the batches and runs
backward.
"""

import torch
from torch.utils.data import DataLoader, TensorDataset

import delora_kernels as dk
from distributed.blocks import batch, blocks, half
from distributed.passes import assert_close, check_step, fused_calls, gradients, single_process


def train(rank: int, method: str, seed: int, before: bool) -> int:
    """The number of fused calls of a pass, accelerated before or after prepare(); the numbers are
    checked here.
    """
    from accelerate import Accelerator

    y, grads, stepped = single_process(method, seed)
    made = blocks(method, seed)
    if before:
        dk.accelerate(made, strict=True)
    accelerator = Accelerator(cpu=True)
    assert accelerator.num_processes == 2
    wrapped, loader = accelerator.prepare(made, DataLoader(TensorDataset(batch(seed)), batch_size=2))
    if not before:
        dk.accelerate(wrapped, strict=True)
    with fused_calls() as calls:
        for (x,) in loader:
            assert torch.equal(x, half(batch(seed), rank))
            out = wrapped(x)
            assert_close({"y": out.detach()}, {"y": half(y, rank)})
            accelerator.backward(out.square().mean())
    assert_close(gradients(wrapped), grads)
    check_step(wrapped, stepped)
    return len(calls)
