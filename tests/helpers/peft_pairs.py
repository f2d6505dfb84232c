"""An accelerated PEFT model beside a plain one with the same numbers, and what must be the same of
the two.
"""

from typing import Any

import peft
import torch
from fused_count import counted
from peft_models import config, model
from torch import Tensor, nn

import delora_kernels as dk

TARGETS = ["first", "second", "third"]
F64 = 1024 * torch.finfo(torch.float64).eps
"""Both sides round differently, a few times in each of some forty operations on the way forth and
back.
"""


def batch(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    """An input of the models of peft_models."""
    return torch.randn(2, 5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def step(made: nn.Module, x: Tensor, **call: Any) -> dict[str, Tensor]:
    """The output and every gradient of one pass over x."""
    made.zero_grad(set_to_none=True)
    x = x.detach().requires_grad_()
    y = made(x, **call)
    (y.double() * torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y)).sum().backward()
    return {"y": y.detach(), "x": x.grad} | gradients(made)


def gradients(made: nn.Module) -> dict[str, Tensor]:
    """Every parameter's gradient by name, those of all DeLoRA strengths λ as one.

    The sum behind the gradient of one λ may cancel by chance, which leaves nothing to measure an
    error by.
    """
    grads = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    lambdas = {name: grads.pop(name) for name in list(grads) if "delora_lambda" in name}
    return grads | ({",".join(lambdas): torch.cat(list(lambdas.values()))} if lambdas else {})


def check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor], tolerance: float = F64) -> None:
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape), name
        if value.numel() > 0:
            error = (ours[name].double() - value.double()).abs().max()
            assert error <= tolerance * value.double().abs().max(), (name, float(error))


def check_alike(made: Any, plain: Any, x: Tensor, fused: int, tolerance: float = F64) -> None:
    """Same state, same status, same numbers; `fused` layers of `made` ran fused."""
    ours, theirs = made.state_dict(), plain.state_dict()
    assert ours.keys() == theirs.keys()
    check_same(ours, theirs, tolerance)  # to rounding: some cases train before
    assert [p.requires_grad for p in made.parameters()] == [p.requires_grad for p in plain.parameters()]
    assert [module.training for module in made.modules()] == [module.training for module in plain.modules()]
    if isinstance(made, peft.PeftModel):
        assert made.get_model_status() == plain.get_model_status()
        assert made.get_layer_status() == plain.get_layer_status()
        assert made.active_adapters == plain.active_adapters
    with counted() as passes:
        results = step(made, x)
    check_same(results, step(plain, x), tolerance)
    assert len(passes) == fused


def pair(method: str, seed: int, **options: Any) -> tuple[Any, Any]:
    """The same model twice, in float64; the first one accelerated."""
    made, plain = (model(method, seed, dtype=torch.float64, **options) for _ in range(2))
    dk.accelerate(made)
    return made, plain


def add(made: Any, name: str, method: str, seed: int = 7, **options: Any) -> None:
    """Add an adapter with numbers fixed by `seed`, DoRA's magnitudes off the norms."""
    torch.manual_seed(seed)
    settings: dict[str, Any] = {"r": 2, "target_modules": TARGETS}
    made.add_adapter(name, config(method, **settings | options))
    with torch.no_grad():
        for key, parameter in made.named_parameters():
            if "magnitude" in key and f".{name}." in key:
                parameter *= 0.5 + torch.rand_like(parameter)
