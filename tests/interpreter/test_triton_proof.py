"""The Triton kernels as an automatic choice sees them, in the dtypes that PEFT makes."""

import pytest
import torch

from delora_kernels.backends import proof
from delora_kernels.calls import CALLS


@pytest.mark.parametrize("function", CALLS)
def test_a_case_is_right(function: str) -> None:
    assert proof.prove(proof.Case("triton", function, False, torch.bfloat16, torch.float32, 16, "cpu")) is None
