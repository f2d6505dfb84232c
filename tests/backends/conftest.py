"""What the tests of launches share."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Every launch that a stand-in for the driver got, nothing compiled or remembered before."""
    from launches_seen import seeing  # which asks for Triton

    with seeing(monkeypatch) as launches:
        yield launches
