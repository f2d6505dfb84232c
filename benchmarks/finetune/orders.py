"""Other orders of summation, for the same losses and gradients in exact arithmetic.

`orders`: the rows of a step dealt to its parts anew, so that gradients are added up in other
orders. `sum_in_parts`: every sum inside the linear layers as two partial sums, as another kernel
might take them.
"""

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

_TRIES = 1000


def orders(parts: int, part_size: int) -> Iterator[torch.Tensor]:
    """Permutations of a step's rows whose sums differ by more than commuting, from each other and
    from the given order.

    A part's gradient is taken to depend on its rows alone, and the first two parts' sum on which
    two they are.

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
    """Return what decides the rounding of a step's sum: the first two parts, then each
    further one.
    """
    parts = [frozenset(part.tolist()) for part in order.split(part_size)]
    return (frozenset(parts[:2]), *(frozenset([part]) for part in parts[2:]))


def sum_in_parts(model: nn.Module, first_part: float) -> None:
    """Make every float32 `nn.Linear` of the model take its sums in two parts, in place.

    Those are the sum over features in y = x Wᵀ and, because autograd follows the parts, over
    out-features in dx and over tokens in dW. A 16-bit layer stays as it is: its parts would be
    rounded, which another order alone does not do.

    Args:
        model: its own instances of `nn.Linear` get a `forward` of their own.
        first_part: how much of each sum is in its first part, between 0 and 1.
    """
    for module in model.modules():
        if type(module) is nn.Linear and module.weight.dtype == torch.float32:
            module.forward = partial(_linear_in_parts, module, first_part)  # type: ignore[method-assign]


def _linear_in_parts(module: nn.Linear, first_part: float, x: Tensor) -> Tensor:
    """x Wᵀ + bias."""
    if torch.is_autocast_enabled(x.device.type):
        return linear(x, module.weight, module.bias)
    tokens = x.reshape(-1, x.shape[-1])
    T, (N, K) = len(tokens), module.weight.shape
    t, n, k = (max(1, int(first_part * size)) for size in (T, N, K))
    weights = module.weight.split((n, N - n))
    sums = []
    for few in tokens.split((t, T - t)):
        ys = [few[:, :k] @ W[:, :k].t() + few[:, k:] @ W[:, k:].t() for W in weights]
        sums.append(torch.cat(ys, dim=1))
    y = torch.cat(sums).view(*x.shape[:-1], N)
    return y if module.bias is None else y + module.bias
