"""Other orders of summation: the rows of a step dealt to its parts anew, for the same gradient in exact arithmetic."""

from collections.abc import Iterator

import torch

_TRIES = 1000


def orders(parts: int, part_size: int) -> Iterator[torch.Tensor]:
    """Permutations of a step's rows whose sums differ by more than commuting, from each other and from the given order.

    A part's gradient is taken to depend on its rows alone, and the first two parts' sum on which two they are.

    Args:
        parts: forward and backward passes of one step.
        part_size: rows of each.

    Yields:
        int64 `[parts * part_size]`; as many as some hundred random permutations contain.
    """
    rows = torch.arange(parts * part_size)
    seen = {_signature(rows, part_size)}
    generator = torch.Generator().manual_seed(0)
    for _ in range(_TRIES):
        order = torch.randperm(parts * part_size, generator=generator)
        signature = _signature(order, part_size)
        if signature not in seen:
            seen.add(signature)
            yield order


def _signature(order: torch.Tensor, part_size: int) -> tuple[frozenset[frozenset[int]], ...]:
    """What decides the rounding of a step's sum: the first two parts, then each further one."""
    parts = [frozenset(part.tolist()) for part in order.split(part_size)]
    return (frozenset(parts[:2]), *(frozenset([part]) for part in parts[2:]))
