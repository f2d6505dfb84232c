"""The fused DoRA alone: y kept in place of a private tensor, rows of zero norm."""

import torch
from fused_calls import assert_same, both, leaves_of
from reference_calls import Maker


def test_dora_saved_output(seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments("dora_branch") | {"bias": None}
    fused, specified = both("dora_branch", arguments | {"saved": "output"}, 3)
    _, specified = both("dora_branch", arguments, 3)
    assert_same(fused, specified, leaves_of(arguments), maker.tensor(5, 6))


def test_zero_rows_of_dora_give_the_bias_and_no_gradient(seed: int) -> None:
    maker = Maker(seed)
    arguments = maker.arguments("dora_peft")
    arguments["weight"][2] = 0
    arguments["B"][2] = 0
    for dropout_seed in (None, 3):
        fused, specified = both("dora_peft", arguments, dropout_seed)
        leaves = leaves_of(arguments)
        y = fused(**leaves)
        assert torch.equal(y[:, 2], arguments["bias"][2].expand(5))
        grads = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), torch.ones_like(y)), strict=True))
        assert all(grad.isfinite().all() for grad in grads.values())
        assert grads["magnitude"][2] == 0
        assert not grads["B"][2].any()
        assert_same(fused, specified, leaves, maker.tensor(5, 6))
