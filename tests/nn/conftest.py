"""A fixture of every test of the modules."""

import pytest
import torch


@pytest.fixture(autouse=True)
def _fresh_random_numbers(seed: int) -> None:
    torch.manual_seed(seed)
