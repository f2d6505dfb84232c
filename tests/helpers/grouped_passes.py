"""What the kernels for rows sorted by expert must compute, whichever backend's: each pass against
plain torch, expert by expert.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from delora_kernels import ops
from delora_kernels.backends.dropout import MaskGroup

C, R = 21, 3
ROWS = {
    "some of each": [7, 1, 16, 3, 9],
    "empty ones": [0, 20, 0, 0, 17],
    "one has all": [0, 0, 40, 0, 0],
    "whole tiles": [16, 32, 0, 16, 16],
    "no rows": [0, 0, 0, 0, 0],
}
NOBODYS = 5


class Passes(NamedTuple):
    """The launchers of a backend, as `GroupedStages` takes them."""

    backend: str
    times_small: Callable[..., Tensor]
    update: Callable[..., None]
    sums: Callable[..., tuple[Tensor | None, Tensor | None]]


def drawn(rows: list[int], seed: int, rank: int = R) -> tuple[Tensor, Tensor, Tensor, Tensor, list[slice]]:
    """x and h, NaN in rows that are nobody's; a small matrix of each expert; offsets; the experts'
    rows.
    """
    generator = torch.Generator().manual_seed(seed)
    T = sum(rows) + NOBODYS
    x, h = (torch.randn(T, width, generator=generator) for width in (C, rank))
    x[-NOBODYS:], h[-NOBODYS:] = torch.nan, torch.nan
    ends = torch.tensor(rows).cumsum(0)
    slices = [slice(int(end) - count, int(end)) for end, count in zip(ends, rows, strict=True)]
    return x, h, torch.randn(len(rows), C, rank, generator=generator), ends, slices


def close(found: Tensor | None, expected: Tensor) -> None:
    """Float32 sums of the same terms in another order."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=2e-5)


def check_products(passes: Passes, rows: list[int], rank: int, seed: int) -> None:
    """What is made of tokens; NaN in nobody's rows shows nowhere."""
    x, h, small, ends, slices = drawn(rows, seed, rank)
    found = passes.times_small(x, small, ends, 0.5, torch.float32)
    out, bias = torch.full_like(x, 2.0), torch.arange(len(rows) * C).view(-1, C).float().cos()
    out[-NOBODYS:] = torch.nan
    passes.update(out, h, small.mT, ends.int(), bias)
    for e, mine in enumerate(slices):
        close(found[mine], 0.5 * x[mine] @ small[e])
        close(out[mine] - bias[e], 2.0 + h[mine] @ small[e].T)
    assert not found[-NOBODYS:].any()
    assert not out[-NOBODYS:].any()


def check_sums(passes: Passes, rows: list[int], seed: int) -> None:
    """What is summed up over tokens; the same bits every time."""
    x, h, _, ends, slices = drawn(rows, seed)
    product, sums = passes.sums(x, h, ends, True)
    for e, mine in enumerate(slices):
        close(None if product is None else product[e], h[mine].T @ x[mine])
        close(None if sums is None else sums[e], x[mine].sum(0))
    again = (*passes.sums(x, h, ends, True), passes.sums(x, h, ends)[0], passes.sums(x, None, ends, True)[1])
    for first, second in zip((product, sums, product, sums), again, strict=True):
        assert first is not None
        assert second is not None
        assert torch.equal(first, second)


def random_rows(generator: torch.Generator, most: int) -> list[int]:
    """Up to `most` experts, some without rows."""
    experts = int(torch.randint(1, most, (), generator=generator))
    counts = torch.randint(0, 40, (experts,), generator=generator)
    return list(map(int, counts * (torch.rand(experts, generator=generator) < 0.7)))


def check_masks(passes: Passes, seed: int) -> None:
    """Of x where it is read, of the term where it is added: the bits of `dropout_mask`."""
    x, h, small, ends, slices = drawn(ROWS["some of each"], seed)
    group = MaskGroup(slice(0, R), 0.4, torch.tensor(seed))
    kept = ops.dropout_mask(len(x), C, 0.4, torch.tensor(seed), passes.backend) / 0.6
    found = passes.times_small(x, small, ends, 1.0, torch.float32, group)
    product, sums = passes.sums(x, h, ends, True, group)
    out = torch.ones_like(x)
    passes.update(out, h, small.mT, ends, None, group)
    for e, mine in enumerate(slices):
        close(found[mine], (kept * x)[mine] @ small[e])
        close(None if product is None else product[e], h[mine].T @ (kept * x)[mine])
        close(None if sums is None else sums[e], x[mine].sum(0))
        close(out[mine], 1 + kept[mine] * (h[mine] @ small[e].T))
