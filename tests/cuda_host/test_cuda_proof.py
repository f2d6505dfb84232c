"""The CUDA kernels as an automatic choice sees them: each case that it may ask for is right."""

import pytest
import torch
from host_backend import SANITIZED, shuffle_threads

from delora_kernels.diagnostics import proof
from delora_kernels.functional import CALLS

WIDE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16


@pytest.mark.skipif(SANITIZED, reason="the other build has the addresses")
@pytest.mark.parametrize("dtypes", [(WIDE, WIDE), (HALF, HALF), (HALF, WIDE), (BF16, BF16), (BF16, WIDE)], ids=str)
@pytest.mark.parametrize("function", CALLS)
def test_every_case_is_right(function: str, dtypes: tuple[torch.dtype, torch.dtype], seed: int) -> None:
    """Each class of ranks, with dropout and bias or without them."""
    shuffle_threads(seed)
    alike = function.startswith("ether") or function in ("grouped_dora_linear", "grouped_delora_linear")
    for rank in proof.RANKS[: 1 if alike else None]:  # these two launch what grouped_lora_linear does
        for both in (False, True):
            drops = both and not function.startswith("ether")
            assert proof.prove(proof.Case("cuda", function, drops, both, *dtypes, False, rank, "cpu")) is None
