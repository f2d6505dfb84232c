"""How many linears each call of several linears of one x takes."""

from typing import Any

import pytest
from torch import Tensor

from delora_kernels.functional import common


def sizes_of_shared_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that grows by the number of linears of each shared call that is made."""
    found: list[int] = []
    run = common.run_shared

    def counting(calls: Any, backend: str) -> tuple[Tensor, ...]:
        found.append(len(calls))
        return run(calls, backend)

    monkeypatch.setattr(common, "run_shared", counting)
    return found
