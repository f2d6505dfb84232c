"""dyᵀ h of the eager backend, in both of its layouts, is the same product."""

from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from delora_kernels.backends.eager import low_rank


class Seen(TorchDispatchMode):
    """Notes the operators that are called."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.operators.append(func._schema.name)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("tokens", [0, 1, low_rank._FEW, low_rank._FEW + 1])
@pytest.mark.parametrize("columns", [low_rank._WIDE, low_rank._WIDE + 1])
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
            found = low_rank.token_product(dy, h, scale, given)
            assert found.is_contiguous()
            assert (found - expected).abs().max() <= 1e-13 * max(1, tokens)
    assert like.isnan().all()


def test_few_tokens_are_not_copied() -> None:
    """A wide layer's product of few tokens is one GEMM, of many its transpose and a copy."""
    for tokens, copies in ((low_rank._FEW, 0), (low_rank._FEW + 1, 1)):
        dy, h = torch.ones(tokens, low_rank._WIDE + 1), torch.ones(tokens, 2)
        with Seen() as seen:
            low_rank.token_product(dy, h, 2.0, torch.empty(dy.shape[1], 2))
        assert seen.operators.count("aten::clone") == copies
        assert seen.operators.count("aten::addmm") == 1
