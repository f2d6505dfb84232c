"""DoRA alone inside PyTorch: what autograd refuses where y is kept in place of a private tensor."""

import pytest
from fused_calls import both, leaves_of
from reference_calls import Maker


def test_saved_output_refuses_consumers_that_write_in_place(seed: int) -> None:
    arguments = Maker(seed).arguments("dora_branch") | {"bias": None, "saved": "output"}
    y = both("dora_branch", arguments, None)[0](**leaves_of(arguments))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.relu_().sum().backward()
