"""export_lora of this library's own modules, alone and beside PEFT layers."""

import copy
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from exports import assert_close, check, export, load, weights
from peft_models import Small, config
from torch import nn

from delora_kernels.nn import AdapterLinear, DeLoRALinear, LoRALinear

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> None:
    torch.manual_seed(seed)


def own(kind: str, linear: nn.Module) -> Any:
    """One of this library's modules on a linear, trained away from its start."""
    if kind.startswith("lora"):
        module: AdapterLinear = LoRALinear.from_linear(linear, 3, alpha=5.0, rslora=kind == "lora rs", dropout_p=0.4)
    else:
        start, _, norm = kind.partition(" ")
        module = DeLoRALinear.from_linear(
            linear, 3, lam=2.0 if norm else 9.0, start=start, weight_norm=norm or "column", dropout_p=0.4
        )
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if name in ("A", "B", "lam"):
                parameter.add_(torch.randn_like(parameter), alpha=0.3)
    return module


OWN = ["lora", "lora rs", "zero", "frozen_live", "frozen_paper", "frozen_paper frobenius", "zero frobenius"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("kind", OWN)
def test_own_modules(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """In any module; a frozen start doubles the rank; a module loads on a linear and on a
    Conv1D.
    """
    base: Any = Small(conv1d=True).to(dtype)
    made = copy.deepcopy(base)
    made.first, made.second = own(kind, made.first), own(kind, made.second)
    check(made, base, tmp_path, torch.randn(4, 12, dtype=dtype))
    R = 6 if kind.startswith("frozen") else 3
    assert {k: tuple(v.shape) for k, v in weights(tmp_path).items()} == {
        "base_model.model.first.lora_A.weight": (R, 12),
        "base_model.model.first.lora_B.weight": (20, R),
        "base_model.model.second.lora_A.weight": (R, 20),
        "base_model.model.second.lora_B.weight": (14, R),
    }
    tensors = weights(tmp_path)
    update = tensors["base_model.model.first.lora_B.weight"] @ tensors["base_model.model.first.lora_A.weight"]
    made.first.merge()
    assert_close(base.first.weight + update, made.first.weight)


def test_own_modules_beside_peft_and_inside_wrappers(tmp_path: Path) -> None:
    """A PeftModel as a part, with a nn.DeLoRALinear beside it, compiled: the names are the base
    model's.
    """
    base: Any = nn.ModuleDict({"body": Small(conv1d=False), "head": nn.Linear(9, 4)})
    made: Any = copy.deepcopy(base)
    made["head"] = own("frozen_live", made["head"])
    made["body"] = peft.get_peft_model(made["body"], config("delora", target_modules=["first", "third"]))
    result = export(nn.Sequential(made), tmp_path / "plain")
    assert result.ranks == {"0.body.first": 3, "0.body.third": 3, "0.head": 6}
    compiled: Any = torch.compile(nn.Sequential(made))
    export(compiled, tmp_path / "compiled")
    assert all(torch.equal(v, weights(tmp_path / "plain")[k]) for k, v in weights(tmp_path / "compiled").items())
    loaded: Any = load(nn.Sequential(base), tmp_path / "plain").base_model.model[0]
    x = torch.randn(5, 12)
    made.eval()
    assert_close(loaded["head"](loaded["body"](x)), made["head"](made["body"](x)))
