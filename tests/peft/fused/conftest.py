"""What the tests of fused layers share."""

from typing import Any

import pytest
from torch import Tensor

from delora_kernels.autograd.low_rank import StraightLinear


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The method of every call that went the straight way."""
    found: list[str] = []
    run = StraightLinear.direct

    def seen(call: Any, backend: str) -> Tensor:
        found.append(call.options.method)
        return run(call, backend)

    monkeypatch.setattr(StraightLinear, "direct", staticmethod(seen))
    return found
