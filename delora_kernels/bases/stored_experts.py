"""Experts' weights in few bits as the weight of a grouped call: a few dense at a time, as many as a
budget holds.

Two forms of a parameter [E, N, K] are read: `PackedExperts` (bitsandbytes' blocks), and those of
torchao's tensors that quantise the weight alone and give a run of experts by a slice, which is
found out at the first of a kind.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from delora_kernels.bases.packed_experts import PackedExperts, Storing
from delora_kernels.bases.stored import dotted_name


class StoredExperts:
    """Weights [E, N, K] of a grouped call, a few dense at a time; not a tensor.

    Args:
        parameter: [E, N, K] or [E, K, N], one that `why_not_stored` has nothing against.
        is_transposed: Whether it is [E, K, N].
    """

    requires_grad = False

    def __init__(self, parameter: Any, is_transposed: bool) -> None:
        self.parameter, self.is_transposed = parameter, is_transposed
        E, *matrix = parameter.shape
        self.shape = torch.Size([E, *(reversed(matrix) if is_transposed else matrix)])
        self.dtype, self.device = parameter.dtype, parameter.device
        storing = parameter.storing if isinstance(parameter, PackedExperts) else Storing()
        self.workspace_mib = storing.workspace_mib

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return experts `first` to `last` - 1, [last - first, N, K] in `dtype`."""
        read = self.parameter.dense if isinstance(self.parameter, PackedExperts) else _read_torchao(self.parameter)
        made: Tensor = read(first, last, dtype)
        return made.mT if self.is_transposed else made

    def groups(self, offsets: Tensor, rows: int, dtype: torch.dtype) -> Iterator[tuple[int, int, slice]]:
        """Yield (first, last, their rows) of experts next to each other that all have rows and fit
        the budget, dense in `dtype`; one of them fits always.

        The offsets are read, which waits for a device: what has no rows is not dequantised.
        """
        _, N, K = self.shape
        most = max(1, int(self.workspace_mib * 2**20) // (N * K * dtype.itemsize))
        ends = [0, *offsets.tolist()]
        if sorted(ends) != ends or ends[-1] > rows:
            raise ValueError(f"offsets must not fall and end at most at x's {rows} rows, got {ends[1:]}")
        first = 0
        while first < len(self):
            last = first
            while last < len(self) and last - first < most and ends[last] < ends[last + 1]:
                last += 1
            if last > first:
                yield first, last, slice(ends[first], ends[last])
            first = max(last, first + 1)

    def computes_in(self, x: Tensor) -> torch.dtype:
        """Return the dtype in which x is multiplied, without autocast: x's."""
        return x.dtype

    def output(self, y: Tensor, x: Tensor) -> Tensor:
        """Return y as the experts give it: as it is."""
        return y


def is_stored(weight: Any) -> bool:
    """Whether a weight is of a form that is read here, if nothing is against it."""
    return type(weight) is PackedExperts or _is_torchao(weight)


def why_not_stored(weight: Any, name: str) -> str | None:
    """Say why a weight of such a form can't be read, or None."""
    if weight.requires_grad:
        return f"its {name} is stored in {'4' if type(weight) is PackedExperts else 'few'} bits, and is to train"
    if type(weight) is PackedExperts:
        return None
    kind = type(weight).__name__
    for option, what in (("act_quant_kwargs", "quantises its input"), ("act_pre_scale", "scales its input")):
        if getattr(weight, option, None) is not None:
            return f"its {name} is torchao's {kind}, which {what} too"
    if weight.dim() != 3 or weight.is_meta:
        return f"its {name} is torchao's {kind} of shape {list(weight.shape)} on {weight.device}"
    key = type(weight), weight.dtype, str(getattr(weight, "block_size", None)), tuple(weight.shape)
    if key not in _found:
        if torch.compiler.is_compiling():
            return f"its {name} is torchao's {kind}, not read before it was traced: call accelerate(model) before"
        _found[key] = _difference(weight)
    reason = _found[key]
    return None if reason is None else f"its {name} is torchao's {kind}, {reason}"


_found: dict[tuple[Any, ...], str | None] = {}
"""Kind of a torchao tensor → what a slice of it has against it, or None."""


def _is_torchao(weight: Any) -> bool:
    return dotted_name(type(weight)).startswith("torchao.") and hasattr(weight, "dequantize")


def _difference(weight: Any) -> str | None:
    """Compare the last two experts by a slice with each by itself."""
    first = max(0, len(weight) - 2)
    try:
        with torch.no_grad():
            found = _read_torchao(weight)(first, len(weight), weight.dtype)
            alone = torch.stack([weight[e].dequantize() for e in range(first, len(weight))])
    except Exception as error:
        return f"which can't be read expert by expert: {type(error).__name__}: {str(error)[:200]}"
    return None if torch.equal(found, alone) else "which reads otherwise expert by expert than in a slice"


def _read_torchao(weight: Any) -> Any:
    def read(first: int, last: int, dtype: torch.dtype) -> Tensor:
        with torch.no_grad():
            made: Tensor = weight[first:last].dequantize()
        return made if made.dtype == dtype else made.to(dtype)

    return read
