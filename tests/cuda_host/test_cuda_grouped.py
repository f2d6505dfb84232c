"""The CUDA kernels for rows sorted by expert on the CPU: how rows are cut, what of them is read,
what is added up in parts.
"""

import pytest
import torch
from grouped_passes import ROWS, Passes, R, check_masks, check_products, check_sums, random_rows
from host_backend import SANITIZED, shuffle_threads

from delora_kernels.backends.cuda import launch
from delora_kernels.backends.cuda.grouped import grouped_sums, grouped_times_small, grouped_update

PASSES = Passes("cuda", grouped_times_small, grouped_update, grouped_sums)


@pytest.fixture(autouse=True)
def _threads_in_any_order(seed: int) -> None:
    shuffle_threads(seed)


@pytest.mark.parametrize("rank", [R, 20, 70])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_each_experts_rows(rows: str, rank: int, seed: int) -> None:
    check_products(PASSES, [5 * count for count in ROWS[rows]], rank, seed)


@pytest.mark.parametrize("target", [1, 528])
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_each_experts_rows(rows: str, target: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in parts, of which no expert sees another's."""
    monkeypatch.setattr(launch, "SPLIT_TARGET", target)
    check_sums(PASSES, [9 * count for count in ROWS[rows]], seed)


def test_random_divisions_of_the_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also among more experts than a warp looks at once."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(3 if SANITIZED else 20):
        rows = random_rows(generator, most=100)
        monkeypatch.setattr(launch, "SPLIT_TARGET", int(torch.randint(1, 40, (), generator=generator)))
        check_products(PASSES, rows, 2, seed)
        check_sums(PASSES, rows, seed)


def test_masks_are_those_of_sorted_rows(seed: int) -> None:
    check_masks(PASSES, seed)
