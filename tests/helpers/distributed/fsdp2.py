"""FSDP2, fully_shard, on blocks, on every adapter layer, and on lora_A and lora_B alone."""

from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import distributed, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

import delora_kernels as dk
from distributed.blocks import Block, batch, blocks, half
from distributed.passes import assert_close, backward, check_step, fused_calls, gradients, single_process

OPTIONS: dict[str, dict[str, Any]] = {
    "reshard": {"reshard_after_forward": True},
    "keep": {"reshard_after_forward": False},
    "offload": {"offload_policy": CPUOffloadPolicy(pin_memory=False)},
}


def train(rank: int, method: str, seed: int, before: bool, units: str, options: str) -> int:
    """The number of fused calls of a pass, accelerated before or after wrapping; the numbers are
    checked here.
    """
    y, grads, stepped = single_process(method, seed)
    x = half(batch(seed), rank)
    made = blocks(method, seed)
    if before:
        dk.accelerate(made, strict=True)
    _shard(made, units, OPTIONS[options])
    report = dk.accelerate(made, strict=units != "leaves")
    assert len(report.layers) == len(report.declined if units == "leaves" else report.deferred) == 6
    with fused_calls() as calls:
        assert_close(backward(made, x), {"y": half(y, rank)})
    for parameter in made.parameters():  # DoRA's magnitudes where only lora_A and lora_B are sharded
        if parameter.grad is not None and not isinstance(parameter, DTensor):
            distributed.all_reduce(parameter.grad)
            parameter.grad /= 2
    assert_close(gradients(made), grads)
    check_step(made, stepped)
    _check_restored(made, x, sharded_layers=units == "layers")
    return len(calls)


def _check_restored(made: Any, x: torch.Tensor, sharded_layers: bool) -> None:
    """restore() gives PEFT's classes back, under FSDP's where FSDP has derived from them."""
    y = made(x)
    assert dk.restore(made) == 6
    layers = [module for module in made.modules() if isinstance(module, BaseTunerLayer)]
    assert {type(layer).__name__ for layer in layers} <= {"Linear", "DeloraLinear", "FSDPLinear", "FSDPDeloraLinear"}
    assert all(isinstance(layer, FSDPModule) is sharded_layers for layer in layers)
    with fused_calls() as calls:
        assert_close({"y": y}, {"y": made(x)})
    assert not calls


def mixed_precision(rank: int, method: str, seed: int, units: str) -> int:
    """The number of fused calls of a pass in bfloat16 of float32 weights, close to plain PEFT in
    float32.
    """
    x = batch(seed, torch.float32)
    plain, made = blocks(method, seed, torch.float32), blocks(method, seed, torch.float32)
    y = backward(plain, x)["y"]
    dk.accelerate(made, strict=True)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    _shard(made, units, {"mp_policy": policy})
    with fused_calls() as calls:
        ours = backward(made, half(x, rank))
    assert ours["y"].dtype == torch.bfloat16
    # six layers one after another, whose weights, inputs and outputs are rounded: 18 roundings of
    # half an eps
    eps = 18 / 2 * torch.finfo(torch.bfloat16).eps
    assert (ours["y"] - half(y, rank)).norm() <= eps * y.norm()
    got, exact = gradients(made), gradients(plain)
    for kind in ("lora_A", "lora_B", "magnitude", "delora_A", "delora_B", "delora_lambda"):
        # all of a kind as one vector: a single gradient may be small because its terms cancel
        names = [name for name in exact if kind in name]
        error = sum((got[name] - exact[name]).square().sum() for name in names)
        size = sum(exact[name].square().sum() for name in names)
        assert error <= (2 * eps) ** 2 * size, kind  # backward passes the layers again
    return len(calls)


def _shard(made: nn.Module, units: str, options: dict[str, Any]) -> None:
    mesh = init_device_mesh("cpu", (2,))
    kinds = {"blocks": Block, "layers": BaseTunerLayer, "leaves": ()}
    for name, module in list(made.named_modules()):
        is_factor = name.endswith(("lora_A.default", "lora_B.default"))
        if is_factor if units == "leaves" else isinstance(module, kinds[units]):
            fully_shard(module, mesh=mesh, **options)
    if units != "leaves":
        fully_shard(made, mesh=mesh, **options)
