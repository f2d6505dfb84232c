"""DeLoRALinear alone: its frozen starts."""

import pytest
import torch
from torch import nn

from delora_kernels.nn import DeLoRALinear
from delora_kernels.testing import relative_error


@pytest.mark.parametrize("start", ["frozen_live", "frozen_paper"])
def test_frozen_start_stays_where_it_was(start: str) -> None:
    linear = nn.Linear(14, 10, dtype=torch.float64)
    module = DeLoRALinear.from_linear(linear, 3, lam=2.0, start=start)
    x = torch.randn(6, 14, dtype=torch.float64)
    module(x).square().sum().backward()
    # the live λ scales a difference that is 0 at the start; λ₀ leaves λ a gradient
    assert (module.lam.grad.abs() < 1e-10) == (start == "frozen_live")
    first = module.A.detach().clone()
    module.lam.data.mul_(2)
    assert (relative_error(module(x), linear(x)) < 1e-12) == (start == "frozen_live")
    module.A.data.neg_()
    assert torch.equal(module.frozen_A, first)
    assert relative_error(module(x), linear(x)) > 1e-3
    y = module(x)
    module.A.data.mul_(1e-6)  # a length means nothing, however small
    assert relative_error(module(x), y) <= 1e-12
    buffers = {name: value.data_ptr() for name, value in module.named_buffers()}
    assert len({*buffers.values(), *(p.data_ptr() for p in module.parameters())}) == len(buffers) + 5
    assert ("frozen_lam" in buffers) == (start == "frozen_paper")
