"""The benchmark's own option."""

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    """--record FILE: where the rows of this run go, as JSON."""
    parser.addoption("--record", default=None, metavar="FILE", help="write the benchmark's rows as JSON")
