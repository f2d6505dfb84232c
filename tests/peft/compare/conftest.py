"""What the tests of compare() share."""

from collections.abc import Callable
from typing import Any

import pytest

from delora_kernels.integrations.peft.compare import run


@pytest.fixture(autouse=True)
def not_weighed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's profiler takes seconds to start: one test weighs."""

    def weigh(run: Callable[[], Any], device: str, warm: bool) -> Any:
        assert warm
        run()
        return run_once_weighed

    run_once_weighed = type("Weighed", (), {"peak": 3 * 2**20})
    monkeypatch.setattr(run, "allocations", weigh)
