"""Float32 factors as bfloat16 planes: what they hold, and the products of them, against float64."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels.backends.triton.planes import planes
from delora_kernels.backends.triton.times_small import FEWEST_RANKS, times_small

SIZES = ((5, 7, FEWEST_RANKS + 1), (1, 1, 40), (70, 50, 130))
HELD = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-14}
"""Dtype of a product → what its planes may lack of a factor: 24 bits, or twice bfloat16's 8, cut
off (a GPU rounds).
"""


@pytest.mark.parametrize("dtype", HELD)
@pytest.mark.parametrize("transposed", [False, True])
def test_products_of_planes(dtype: torch.dtype, transposed: bool, seed: int) -> None:
    """x (c ⊙ S) of a float32 S, and of a bfloat16 one whose column is not rounded."""
    generator = torch.Generator().manual_seed(seed)
    for T, C, R in SIZES:
        x, c = torch.randn(T, C, generator=generator).bfloat16(), torch.randn(C, generator=generator)
        S = torch.randn(*((R, C) if transposed else (C, R)), generator=generator)
        S = S.t() if transposed else S
        for small, column in ((S, None), (S, c), (S.bfloat16(), c)):
            exact = small.double() * (1 if column is None else column.double()[:, None])
            parts = planes(small, dtype, column)
            assert parts.dtype == torch.bfloat16
            assert parts.shape[0] == (3 if dtype == torch.float32 else 2)
            assert ((parts.double().sum(0) - exact).abs() <= HELD[dtype] * exact.abs()).all()
            found, terms = times_small(x, small, dtype, None, column).double(), x.double().abs() @ exact.abs()
            limit = (HELD[dtype] + 3 * C * 2.0**-24) * terms + torch.finfo(dtype).eps * (x.double() @ exact).abs()
            assert ((found - x.double() @ exact).abs() <= limit).all()


def test_planes_of_what_is_not_finite(seed: int) -> None:
    """Inf and NaN of a factor stay what they are: one plane has them, the others nothing."""
    S = torch.randn(4, FEWEST_RANKS + 1, generator=torch.Generator().manual_seed(seed))
    S[0, 0], S[1, 1], S[2, 2] = float("inf"), float("-inf"), float("nan")
    for dtype in HELD:
        total = planes(S, dtype).float().sum(0)
        assert total[0, 0] == float("inf")
        assert total[1, 1] == float("-inf")
        assert total[2, 2].isnan()
        assert total.isfinite().sum() == S.numel() - 3
