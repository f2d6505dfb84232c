"""Siblings of one x on the Triton backend: numbers, reads of x and launches, as one call and one by
one.
"""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from torch import Tensor
from traffic import Traffic

from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.backends.triton import forms

T, K, R = 96, 56, 5
WIDTHS = (72, 40, 24)


class Siblings:
    """q, k and v of one x, and what comes back of each."""

    def __init__(self, seed: int, dtype: torch.dtype, factors: torch.dtype) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int, of: torch.dtype = dtype) -> Tensor:
            return torch.randn(*shape, generator=generator).to(of)

        self.x = normal(T, K).requires_grad_()
        self.weights = [normal(N, K) for N in WIDTHS]
        self.A = [normal(R, K, of=factors).requires_grad_() for _ in WIDTHS]
        self.B = [normal(N, R, of=factors).requires_grad_() for N in WIDTHS]
        self.dys = [normal(T, N) for N in WIDTHS]

    def outputs(self, together: bool, dropout_p: float = 0.0) -> tuple[Tensor, ...]:
        rest: dict[str, Any] = {"scale": 0.5, "dropout_p": dropout_p}
        if together:
            return F.lora_linears(self.x, self.weights, self.A, self.B, seed=3, **rest)
        parts = enumerate(zip(self.weights, self.A, self.B, strict=True))
        return tuple(F.lora_linear(self.x, W, A, B, seed=3 + i, **rest) for i, (W, A, B) in parts)

    def gradients(self, outputs: tuple[Tensor, ...]) -> list[Tensor]:
        dys = [dy.to(y.dtype) for dy, y in zip(self.dys, outputs, strict=True)]
        return list(torch.autograd.grad(outputs, [self.x, *self.A, *self.B], dys))


@pytest.mark.parametrize("form", [forms.UPDATE, forms.PREFILL, forms.OWN])
@pytest.mark.parametrize("dropout_p", [0.0, 0.25])
def test_numbers(form: str, dropout_p: float, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(forms, "DEFAULT", form)
    for dtype in (torch.float32, torch.float16):
        made, found = Siblings(seed, dtype, torch.float32), []
        for backend, together in (("triton", True), ("triton", False), ("eager", False)):
            with use_backend(backend):
                outputs = made.outputs(together, dropout_p)
                found.append([*outputs, *made.gradients(outputs)])
        for ours, alone, eager in zip(*found, strict=True):
            limit = 16 * torch.finfo(dtype).eps * float(eager.abs().max())
            assert (ours.double() - alone.double()).abs().max() <= limit
            assert (ours.double() - eager.double()).abs().max() <= limit


def test_reads_of_x_and_launches(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A q/k/v of float32 adapters under bfloat16 autocast: beside the frozen products, x is read
    once forward and once backward.
    """
    monkeypatch.setattr(forms, "DEFAULT", forms.PREFILL)
    made = Siblings(seed, torch.bfloat16, torch.float32)
    found = {}
    for together in (True, False):
        with use_backend("triton"), torch.autocast("cpu", torch.bfloat16), Traffic({"x": T * K}) as forward:
            outputs = made.outputs(together)
        with use_backend("triton"), Traffic({"x": T * K}) as backward:
            made.gradients(outputs)
        found[together] = (forward.read["x"], forward.launches), (backward.read["x"], backward.launches)
    # forward: three frozen products read x; backward: of dx, each product reads what is there
    assert found[False] == ((3 + 3, 12), (3 + 3, 15))
    assert found[True] == ((3 + 1, 10), (3 + 1, 11))
