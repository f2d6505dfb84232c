"""Products of tokens with few columns: the same values in whichever form they are computed."""

import pytest
import torch
from torch import Tensor

import delora_kernels as dk
from delora_kernels import ops
from delora_kernels.backends.eager import thin_products
from delora_kernels.op_arguments import Rescaled, TermGradients

SIZES = ((512, 128), (64, 1024), (80, 64))  # the last one is too small to take another form
UNIT = {torch.float64: 2.0**-53, torch.float32: 2.0**-24}


def assert_sums(ours: Tensor, left: Tensor, right: Tensor, scale: float) -> None:
    """ours is scale · left right of these values, within the rounding of a sum of so many terms in
    its dtype, whatever their order.
    """
    left, right = left.double(), right.double()
    error, terms = (ours.double() - scale * (left @ right)).abs(), left.shape[1]
    limit = (terms + 2) * UNIT[ours.dtype] * abs(scale) * (left.abs() @ right.abs())
    assert ours.is_contiguous()
    assert (error <= limit + torch.finfo(torch.float64).eps * limit.max()).all()


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float64,) * 2, (torch.bfloat16, torch.float32)])
def test_gradients_of_few_columns(dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for T, N in SIZES:
        for R in (1, 3, 8, 15, 16):
            dy, h, B_hat = (
                torch.randn(size, generator=generator, dtype=torch.float64).to(dtype)
                for size, dtype in zip(((T, N), (T, R), (N, R)), (dtypes[0], *dtypes[1:] * 2), strict=True)
            )
            with torch.no_grad():
                dv, dB, *_ = ops.expand_backward(dy, TermGradients(h, B_hat, 1.7), Rescaled(), False, "eager")
            assert_sums(dv, dy, B_hat, 1.0)
            assert_sums(dB, dy.t(), h, 1.7)


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_layers_of_few_columns(method: str, seed: int) -> None:
    """A layer's gradients are the same in float64 whether the size asks for another form or not."""
    torch.manual_seed(seed)
    T, K, N, r = 512, 24, 128, 5
    x, W, A, B = (torch.randn(size, dtype=torch.float64) for size in ((T, K), (N, K), (r, K), (N, r)))
    function, more = {
        "lora": (dk.functional.lora_linear, (1.5,)),
        "dora": (dk.functional.dora_linear, (torch.rand(N, dtype=torch.float64), 1.5)),
        "delora": (dk.functional.delora_linear, (torch.tensor(0.8, dtype=torch.float64), W.norm(dim=0))),
    }[method]
    dy, found = torch.randn(T, N, dtype=torch.float64), []
    for large in (T * N, T * N + 1):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(thin_products, "_LARGE", large)
            leaves = [each.clone().requires_grad_() for each in (x, A, B)]
            y = function(leaves[0], W, *leaves[1:], *more)
            found.append(torch.autograd.grad(y, leaves, dy))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-11 * float(other.abs().max()))


def test_a_thin_factor_is_laid_by_columns(seed: int) -> None:
    """Where it pays: fewer columns than a panel, many numbers in dy, a dtype that was measured."""
    B, dy = torch.randn(512, 8), torch.empty(128, 512)
    assert thin_products.by_columns(B, dy).stride() == (1, 512)
    assert torch.equal(thin_products.by_columns(B, dy), B)
    for factor, tokens in ((torch.randn(512, 16), dy), (B, dy[:127]), (B.bfloat16(), dy.bfloat16())):
        assert thin_products.by_columns(factor, tokens) is factor
