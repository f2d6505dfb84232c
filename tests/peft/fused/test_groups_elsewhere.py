"""Groups in models that nobody wrote for, and in what FSDP2 shards."""

from typing import Any

import peft
import pytest
import torch
from peft_models import config
from peft_pairs import check_same
from siblings import K, batch, model, step, warm_up
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

import delora_kernels as dk

METHODS = ("lora", "dora", "delora")


class Apiary(nn.Module):
    """Linears in a ModuleDict, called in a loop in another order than they were made in, and one in
    a Sequential; two of them are given something else.
    """

    def __init__(self) -> None:
        super().__init__()
        self.hives = nn.ModuleDict({name: nn.Linear(K, 6 + len(name)) for name in ("wasp", "bee", "k9", "hornet")})
        self.lid = nn.Sequential(nn.LayerNorm(K), nn.Linear(K, 5), nn.Tanh(), nn.Linear(5, 7, bias=False))

    def forward(self, nectar: Tensor) -> Tensor:
        order = ("hornet", "k9", "bee")
        found = [self.hives[name](nectar) for name in order]
        found += [self.lid(nectar), self.hives["wasp"](nectar.tanh())]
        return torch.cat(found, dim=-1)


@pytest.mark.parametrize("method", METHODS)
def test_a_model_nobody_wrote_for(method: str, seed: int, shared: list[int]) -> None:
    """Names and the order of registration play no part: who is given the same tensor is a group."""
    made, plain = (_apiary(method, seed) for _ in range(2))
    report = dk.accelerate(made, strict=True)
    warm_up(made, seed)
    assert report.groups == (tuple(f"base_model.model.hives.{name}" for name in ("hornet", "k9", "bee")),)
    shared.clear()
    check_same(step(made, batch(seed)), step(plain, batch(seed)), 1e-12)
    assert shared == [3]


def _apiary(method: str, seed: int) -> Any:
    torch.manual_seed(seed)
    targets = ["hornet", "k9", "bee", "wasp", "lid.1", "lid.3"]
    made = peft.get_peft_model(Apiary(), config(method, target_modules=targets)).double()
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if "magnitude" in name:
                parameter *= 0.5 + torch.rand_like(parameter)
    return made.train()


@pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="torch has no gloo here")
@pytest.mark.parametrize(
    ("method", "unit"), [*((method, "block") for method in METHODS), ("lora", "q"), ("delora", "k")]
)
def test_fsdp2(method: str, unit: str, seed: int, process_group: None, shared: list[int], planned: list[int]) -> None:
    """Blocks that are gathered whole run their groups; a layer that is a unit of its own, whose
    weights are there in its own call alone, runs alone and takes its group along.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    made, plain = model(method, seed, blocks=2), model(method, seed, blocks=2)
    report = dk.accelerate(made, strict=True)
    mesh = init_device_mesh("cpu", (1,))
    for block in made.base_model.model:
        fully_shard(block if unit == "block" else getattr(block.attention, unit), mesh=mesh)
    fully_shard(made, mesh=mesh)
    warm_up(made, seed)
    shared.clear()
    planned.clear()
    found = {name: _whole(value) for name, value in step(made, batch(seed)).items()}
    check_same(found, step(plain, batch(seed)), 1e-12)
    # in the second block FSDP hands a unit an x of its own, so that k and v share theirs without q
    assert shared + planned == {"block": [3, 2] * 2, "q": [2] * 3, "k": [2] * 2}[unit]
    assert {f"base_model.model.{number}.gate" for number in range(2)} <= {group[0] for group in report.groups}


def _whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
