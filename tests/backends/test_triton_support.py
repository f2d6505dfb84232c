"""What the Triton backend does not take: the reason that `explain` gives is the one that an
explicit request raises.
"""

import os
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter takes CPU tensors (tests/interpreter/test_triton.py)", allow_module_level=True)

from benchmarks.stand_in import standing_in
from delora_kernels import explain, use_backend
from delora_kernels import functional as F
from delora_kernels.backends.triton import support
from delora_kernels.functional.lora import lora_call


def lora(dtype: torch.dtype = torch.float32, r: int = 2) -> dict[str, torch.Tensor]:
    shapes = {"x": (3, 6), "weight": (5, 6), "A": (r, 6), "B": (5, r)}
    return {name: torch.ones(shape, dtype=dtype) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("arguments", "interpreted", "reason"),
    [
        (lora(), False, "its tensors are on cpu"),
        (lora(torch.float64), True, "float64 has no fast units"),
        (lora(r=513), True, "rank 513 is above 512"),
        (lora(r=512), True, None),
    ],
)
def test_device_dtype_and_rank(arguments: dict[str, torch.Tensor], interpreted: bool, reason: str | None) -> None:
    with standing_in(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(support, "INTERPRETED", interpreted)
        if reason is None:
            with use_backend("triton"):
                assert explain("lora_linear", **arguments).backend == "triton"
        else:
            found = explain("lora_linear", **arguments)
            assert (found.backend, found.reasons["triton"]) == ("eager", reason)
            with use_backend("triton"), pytest.raises(RuntimeError, match=f"can't take this call: {reason}"):
                F.lora_linear(**arguments)


def test_an_old_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    call = lora_call(**lora())
    for index, capability in enumerate([(7, 5), (8, 0), (9, 0)]):
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device, found=capability: found)
        there = call._replace(x=SimpleNamespace(device=torch.device("cuda", index)))
        assert support.supports(there) == ("the GPU is older than sm_80" if capability < (8, 0) else None)
