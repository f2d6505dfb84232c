"""The checks in this process leave out stored bases, whose libraries one has and another not."""

import pytest

from delora_kernels.diagnostics import stored_forms


@pytest.fixture(autouse=True)
def no_stored_forms(monkeypatch: pytest.MonkeyPatch) -> None:
    """No form but those that a test names."""
    monkeypatch.setattr(stored_forms, "FORMS", {})
