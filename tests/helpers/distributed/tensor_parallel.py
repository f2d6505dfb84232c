"""Tensor parallel: sharded bases, sharded factors, a replicated model of DTensors, and
Transformers' own plan.
"""

from typing import Any

import peft
import torch
import transformers
from peft_models import config
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Replicate, distribute_module, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

import delora_kernels as dk
from distributed.blocks import BLOCKS, batch, blocks
from distributed.passes import assert_close, backward, fused_calls, gradients, single_process


def train(rank: int, method: str, seed: int, before: bool, sharded: str) -> int:
    """The number of fused calls of a pass, accelerated before or after wrapping; the numbers are
    checked here.
    """
    y, grads, _ = single_process(method, seed)
    x, made = batch(seed), blocks(method, seed)
    if before:
        dk.accelerate(made, strict=True)
    mesh = init_device_mesh("cpu", (2,))
    if sharded == "replicated":
        distribute_module(made, mesh)
        x = distribute_tensor(x, mesh, [Replicate()])
    else:
        parallelize_module(made, mesh, _plan(sharded))
    if not before:
        dk.accelerate(made)
    with fused_calls() as calls:
        assert_close(backward(made, x), {"y": y})
    got = gradients(made)  # torch 2.7 lets the bases that it shards train too
    assert_close({name: got[name] for name in grads}, grads)
    return len(calls)


def _plan(sharded: str) -> dict[str, Any]:
    """First layers by columns and third layers by rows, with whole inputs and outputs: bases,
    factors or both.
    """
    columns, rows = ColwiseParallel(output_layouts=Replicate()), RowwiseParallel(input_layouts=Replicate())
    plan: dict[str, Any] = {}
    for i in range(BLOCKS):
        at = f"base_model.model.blocks.{i}"
        if sharded in ("base", "both"):
            plan |= {f"{at}.first.base_layer": columns, f"{at}.third.base_layer": rows}
        if sharded in ("factors", "both"):
            plan |= {f"{at}.first.lora_B.default": columns, f"{at}.third.lora_A.default": rows}
    return plan


def llama(rank: int, directory: str, seed: int) -> int:
    """Transformers' tensor parallel Llama, whose factors PEFT shards too: the same with and without
    accelerate().
    """
    from transformers.distributed import DistributedConfig

    results = []
    for accelerated in (False, True):
        parallel = DistributedConfig(tp_size=2, tp_plan="auto")
        base = transformers.AutoModelForCausalLM.from_pretrained(directory, distributed_config=parallel)
        torch.manual_seed(seed + rank)
        made = peft.get_peft_model(base, config("lora", target_modules=["q_proj", "v_proj", "gate_proj"]))
        if accelerated:
            report = dk.accelerate(made)
            assert len(report.layers) == 6
        ids = torch.arange(24).reshape(2, 12)
        with fused_calls() as calls:
            loss = made(input_ids=ids, labels=ids).loss
            loss.backward()
        results.append({"loss": loss.detach()} | gradients(made))
    assert_close(results[1], results[0])
    return len(calls)
