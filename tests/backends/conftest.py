"""What the tests of launches share."""

from collections.abc import Iterator
from typing import Any

import pytest
from planned_calls import planning

from delora_kernels.autograd import replayed


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every launch that a stand-in for the driver got, nothing compiled or remembered before."""
    from launches_seen import seeing  # which asks for Triton

    with seeing(monkeypatch) as launches:
        yield launches


@pytest.fixture
def plans() -> Iterator[None]:
    """Eager calls are planned as those of kernels are; none is known before."""
    with planning():
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
