"""What the tests of fused layers share."""

from collections.abc import Iterator
from typing import Any

import pytest
from planned_calls import planning
from shared_calls import sizes_of_shared_calls
from torch import Tensor

from delora_kernels.autograd import replayed
from delora_kernels.autograd.low_rank import StraightLinear
from delora_kernels.functional import straight


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


@pytest.fixture
def shared(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many layers each call of a group took."""
    found: list[int] = []
    run = straight.shared_direct

    def counting(calls: Any) -> tuple[Tensor, ...]:
        found.append(len(calls))
        return run(calls)

    monkeypatch.setattr(straight, "shared_direct", counting)
    return found


planned = pytest.fixture(sizes_of_shared_calls)
"""How many layers each call of a group took whose calls plan.py made."""


@pytest.fixture
def by_plan(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """The method of every call that ran by its plan; eager calls are planned as those of kernels
    are.
    """
    found: list[str] = []
    run = replayed.Plan.computed

    def computed(plan: Any, *given: Any) -> Any:
        found.append(plan.kind.options.method)
        return run(plan, *given)

    monkeypatch.setattr(replayed.Plan, "computed", computed)
    with planning():
        yield found
