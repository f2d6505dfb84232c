"""Fixtures of every test: fresh random data whose seed a failing test shows."""

import os
import secrets

import pytest


@pytest.fixture
def seed() -> int:
    """A fresh seed, printed; TEST_SEED in the environment repeats one."""
    seed = int(os.environ.get("TEST_SEED", secrets.randbits(31)))
    print(f"TEST_SEED={seed}")
    return seed
