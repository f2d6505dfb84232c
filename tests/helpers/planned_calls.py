"""Calls that are planned, with plans and without: what they are made of, what they give."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.backends import eager, tape

T, K, N, R = 6, 24, 40, 4
METHODS = ("lora", "dora", "delora")


@contextmanager
def planning() -> Iterator[None]:
    """Eager calls are planned as those of kernels are; none is known before."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(eager, "begin", lambda device: 0, raising=False)
        patch.setattr(tape, "_known", {})
        patch.setattr(tape, "calls", {})
        with use_backend("eager"):
            yield


class Derived(torch.nn.Parameter):
    """A tensor that might do more."""


def draw(method: str, seed: int, lead: tuple[int, ...] = (2, T // 2), **but: Any) -> dict[str, Any]:
    """bfloat16 with float32 factors, everything but W trained."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(shape, generator=generator).to(dtype)

    wide = torch.bfloat16
    made: dict[str, Any] = {"x": drawn(*lead, K, dtype=wide), "weight": drawn(N, K, dtype=wide)}
    made |= {"bias": drawn(N, dtype=wide), "A": drawn(R, K), "B": drawn(N, R)}
    if method == "dora":
        made["magnitude"] = drawn(N).abs()
    if method == "delora":
        made |= {"lam": drawn(1), "weight_norm": drawn(K).abs()}
    else:
        made["scale"] = 0.5
    for name in ("x", "bias", "A", "B", "magnitude", "lam"):
        if name in made:
            made[name].requires_grad_()
    return made | but


def forward(method: str, made: dict[str, Any]) -> Tensor:
    y: Tensor = getattr(F, f"{method}_linear")(**made)
    return y


def outcome(method: str, made: dict[str, Any], y: Tensor | None = None) -> list[Tensor]:
    """y and every gradient."""
    y = forward(method, made) if y is None else y
    leaves = [value for value in made.values() if isinstance(value, Tensor) and value.requires_grad]
    if not y.requires_grad:
        return [y]
    dy = torch.randn(y.shape, generator=torch.Generator().manual_seed(0)).to(y.dtype)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


def unplanned(run: Callable[[], Any]) -> Any:
    tape.enabled, before = False, tape.enabled
    try:
        return run()
    finally:
        tape.enabled = before


def learn(method: str, seed: int, **options: Any) -> None:
    for i in range(4):
        outcome(method, draw(method, seed + i, **options))


def same(found: list[Tensor], expected: list[Tensor]) -> None:
    for got, wanted in zip(found, expected, strict=True):
        assert got.dtype == wanted.dtype
        assert torch.equal(got, wanted)
