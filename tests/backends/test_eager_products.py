"""dyᵀ h of the eager backend, in both of its layouts, is the same product."""

from typing import Any

import pytest
import torch
from torch import Tensor

from delora_kernels.backends.eager import thin_products


@pytest.mark.parametrize("tokens", [0, 1, thin_products._FEW, thin_products._FEW + 1])
@pytest.mark.parametrize("columns", [thin_products._WIDE, thin_products._WIDE + 1])
def test_token_product(tokens: int, columns: int, seed: int) -> None:
    """float64, of any strides: scale · dyᵀ h, in memory of its own; what `like` holds is not
    read.
    """
    generator = torch.Generator().manual_seed(seed)
    dy = torch.randn(tokens, columns, generator=generator, dtype=torch.float64)
    h = torch.randn(tokens, 6, generator=generator, dtype=torch.float64)[:, 1:4]
    like = torch.full((columns, 3), torch.nan, dtype=torch.float64)
    for scale in (1.0, -1.7):
        expected = scale * torch.einsum("tn,tr->nr", dy, h)
        for given in (None, like):
            found = thin_products.token_product(dy, h, scale, given)
            assert found.is_contiguous()
            assert (found - expected).abs().max() <= 1e-13 * max(1, tokens)
    assert like.isnan().all()


def test_few_tokens_are_not_turned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A wide layer's product is taken as it stands of few tokens, of many transposed."""
    rows: list[int] = []
    product = thin_products.product

    def noted(left: Tensor, *args: Any) -> Tensor:
        rows.append(len(left))
        return product(left, *args)

    monkeypatch.setattr(thin_products, "product", noted)
    for tokens in (thin_products._FEW, thin_products._FEW + 1):
        thin_products.token_product(torch.ones(tokens, thin_products._WIDE + 1), torch.ones(tokens, 16), 2.0)
    assert rows == [thin_products._WIDE + 1, 16]
