"""What the tests of launches share."""

from collections.abc import Iterator
from typing import Any

import pytest

from delora_kernels import use_backend
from delora_kernels.autograd import replayed
from delora_kernels.backends import eager, tape


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every launch that a stand-in for the driver got, nothing compiled or remembered before."""
    from launches_seen import seeing  # which asks for Triton

    with seeing(monkeypatch) as launches:
        yield launches


@pytest.fixture
def plans(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Eager calls are planned as those of kernels are; none is known before."""
    monkeypatch.setattr(eager, "begin", lambda device: 0, raising=False)
    monkeypatch.setattr(tape, "_known", {})
    monkeypatch.setattr(tape, "calls", {})
    with use_backend("eager"):
        yield


@pytest.fixture
def taken(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The plans by which calls ran."""
    found: list[Any] = []
    real = replayed.Plan.computed

    def computed(plan: Any, *given: Any) -> Any:
        found.append(plan)
        return real(plan, *given)

    monkeypatch.setattr(replayed.Plan, "computed", computed)
    return found
