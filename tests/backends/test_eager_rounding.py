"""What the eager backend promises about rounding: results as good as the exact ones rounded
once.
"""

import pytest
import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaled, Rescaling, TermGradients

T, K, N, R = 96, 128, 160, 8


def mean_error(ours: Tensor, exact: Tensor) -> float:
    """Root mean square of the error, over that of rounding the exact values once to ours' dtype."""
    rounded = exact.to(ours.dtype).double()
    return float((ours.double() - exact).norm() / (rounded - exact).norm())


@pytest.fixture
def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_float32_branch_of_a_bfloat16_base(generator: torch.Generator) -> None:
    """High and low halves: with W = 0, y and dx are the float32 branch, rounded once."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    x, W, dy = normal(T, K).bfloat16(), torch.zeros(N, K).bfloat16(), normal(T, N).bfloat16()
    h, B_hat, dv, A_hat = normal(T, R), normal(N, R), normal(T, R), normal(R, K)
    with torch.no_grad():
        y, _ = ops.expand(x, W, None, RankTerm(h, B_hat, 1.7), Rescaling(), "eager")
        dx, _ = ops.input_backward(dy, Frozen(W), Branch(dv, A_hat, None, R, 1.7), Masks(), "eager")
    assert mean_error(y, 1.7 * h.double() @ B_hat.double().T) <= 1.01
    assert mean_error(dx, 1.7 * dv.double() @ A_hat.double()) <= 1.01


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_doras_scaled_factor_is_not_rounded(dtype: torch.dtype, generator: torch.Generator) -> None:
    """dv = dy (c ⊙ B̂): c ⊙ B̂ goes in as two halves, so that dv alone is rounded."""
    dy = torch.randn(T, N, generator=generator).to(dtype)
    B_hat = torch.randn(N, R, generator=generator).to(dtype)
    c = 0.5 + torch.rand(N, generator=generator)
    with torch.no_grad():
        dv, *_ = ops.expand_backward(dy, TermGradients(None, B_hat), Rescaled(c), False, "eager")
    assert mean_error(dv, dy.double() @ (c[:, None].double() * B_hat.double())) <= 1.05


def test_dora_is_scaled_in_float32(generator: torch.Generator) -> None:
    """y = c ⊙ (x Wᵀ + h B̂ᵀ) + bias: the frozen product is rounded, then y; nothing in between."""
    x = torch.randn(T, K, generator=generator).bfloat16()
    W = (torch.randn(N, K, generator=generator) / K**0.5).bfloat16()
    h, B_hat = (torch.randn(size, generator=generator).bfloat16() for size in ((T, R), (N, R)))
    c, bias = 0.5 + torch.rand(N, generator=generator), torch.randn(N, generator=generator).bfloat16()
    with torch.no_grad():
        y, _ = ops.expand(x, W, bias, RankTerm(h, B_hat, 1.3), Rescaling(c), "eager")
    frozen = (x.double() @ W.double().T).bfloat16().double()
    exact = c.double() * (frozen + 1.3 * h.double() @ B_hat.double().T) + bias.double()
    assert mean_error(y, exact) <= 1.05
