"""What one read of a token-sized matrix sums up, all of it at once: with a mask, which falls on the product alone."""

import pytest
import torch
from host_backend import shuffle_threads

from delora_kernels.backends.cuda import kernels
from delora_kernels.backends.eager.hashed_dropout import mask_groups


@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("columns", [64, 70])
def test_vectors_beside_a_masked_product(columns: int, sums: bool, seed: int) -> None:
    """With 70 columns only some threads of the last tile have one."""
    shuffle_threads(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 200, columns, generator=generator)
    h = torch.randn(200, 5, generator=generator)
    (group,) = mask_groups(5, [5], [0.5], torch.tensor([seed]))
    found = kernels.token_sums(x, h, sums=sums, y=y, group=group)
    assert found.product is not None
    assert found.dots is not None
    kept = kernels.dropout_mask(200, columns, 0.5, group.seed)
    expected = {"product": (2 * x * kept).double().t() @ h.double(), "dots": (x.double() * y.double()).sum(0)}
    results = {"product": found.product.sum(0), "dots": found.dots.sum(0)}
    if sums:
        assert found.sums is not None
        expected["sums"], results["sums"] = x.double().sum(0), found.sums.sum(0)
    for name, result in results.items():
        assert (result - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name
