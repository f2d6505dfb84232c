"""weight_changes on bases in few bits: W is what the base is dequantised to."""

from typing import Any

import peft
import peft_models
import pytest
import torch
from stored_layers import bitsandbytes_4bit, hqq, torchao
from torch import nn

import delora_kernels as dk

torch.set_num_threads(1)


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("make", [bitsandbytes_4bit, hqq, torchao])
def test_a_stored_base_is_what_it_is_dequantised_to(make: Any, method: str, seed: int) -> None:
    torch.manual_seed(seed)
    base = make(12, 20)
    made = peft.get_peft_model(nn.Sequential(base), peft_models.config(method, target_modules=["0"]))
    layer: Any = made.base_model.model[0]
    layer.lora_B["default"].weight.data.normal_()
    (row,) = dk.weight_changes(made.eval()).rows
    with torch.no_grad():
        zero = base(torch.zeros(1, 20))
        W = (base(torch.eye(20)) - zero).t().double()
        moved = W + layer.get_delta_weight("default").double()
    if method == "dora":  # whose magnitude is the length at the start
        moved *= (layer.lora_magnitude_vector["default"].weight.double() / moved.norm(dim=1))[:, None]
    assert row.update_norm == pytest.approx(float((moved - W).norm()), rel=1e-5)
    assert row.weight_norm == pytest.approx(float(W.norm()), rel=1e-5)
    assert row.direction == pytest.approx(float((1 - nn.functional.cosine_similarity(moved, W)).mean()), rel=1e-5)
