"""DoRALinear alone: what can't be kept, rows of zero norm."""

import pytest
import torch
from nn_modules import make
from torch import nn

from delora_kernels.nn import DoRALinear
from delora_kernels.testing import relative_error


def test_saved_output_with_dropout_is_refused_at_once() -> None:
    linear = nn.Linear(6, 5, bias=False)
    with pytest.raises(ValueError, match=r"saved must be 'private' here, .*dropout"):
        DoRALinear.from_linear(linear, saved="output", dropout_p=0.1)
    DoRALinear.from_linear(linear, saved="output", dropout_p=0.1, dropout="branch")(torch.randn(3, 6)).sum().backward()


def test_dora_row_of_zero_norm() -> None:
    module, linear = make("dora")
    linear.weight.data[4], module.B.data[4] = 0, 0
    x = torch.randn(6, 14, dtype=torch.float64)
    assert torch.equal(module(x)[:, 4], linear.bias[4].expand(6))
    module.merge()
    assert module.weight[4].abs().max() == 0
    module.unmerge()
    module.reset_parameters()
    assert module.magnitude[4] == 0
    assert relative_error(module(x), linear(x)) <= 1e-14
