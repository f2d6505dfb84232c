"""The Triton kernels as an automatic choice sees them, in the dtypes that PEFT makes."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels.diagnostics import proof
from delora_kernels.functional import CALLS

WIDE, BF16 = torch.float32, torch.bfloat16


@pytest.mark.parametrize("function", CALLS)
def test_a_case_is_right(function: str) -> None:
    assert proof.prove(proof.Case("triton", function, False, False, BF16, WIDE, False, 16, "cpu")) is None


@pytest.mark.parametrize("function", ["lora_linear", "moe_lora_linear"])
def test_the_largest_ranks(function: str) -> None:
    """No method that stands for the others has more ranks than the kernels take."""
    assert proof.prove(proof.Case("triton", function, True, False, BF16, WIDE, False, proof.RANKS[-1], "cpu")) is None
