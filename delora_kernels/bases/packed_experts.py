"""The 3-D weights of an expert model in bitsandbytes' 4-bit blocks, one expert after the other.

`PackedExperts` stands in the place of the parameter [E, N, K]: a tensor that has its shape, dtype
and device, and holds packed [E, N K / 2] and absmax [E, N K / blocksize]. bitsandbytes has no such
parameter (its linears are modules, and its parametrization makes the whole of it dense at every
look). One expert of it (`weight[3]`) is dequantised alone; any other computation sees all of it,
dequantised; nothing can be written to it.

`StoredExperts` is what a grouped call takes as its weight: it hands out a few dense experts at a
time, as many as the budget holds.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
READ_ONLY = (
    "a weight of experts that is stored in 4 bits can't be written to, for rounding would take an adapter away: export "
    "the adapter (export_lora), or merge it into the model loaded in 16 bits"
)


class PackedExperts(Tensor):
    """A weight [E, N, K] in blocks of 4-bit numbers.

    Args:
        packed: uint8, [E, ⌈N K / 2⌉].
        absmax: float32, [E, ⌈N K / blocksize⌉].
        shape: E, N, K.
        dtype: What it is dequantised to, and was quantised from.
        quant_type: "nf4" or "fp4".
        blocksize: Numbers that share one of absmax.
        workspace_mib: Budget of the dense experts that are there at a time.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    blocksize: int
    workspace_mib: float

    @staticmethod
    def __new__(cls, packed: Tensor, absmax: Tensor, shape: Any, dtype: torch.dtype, *how: Any) -> "PackedExperts":
        make: Any = Tensor._make_wrapper_subclass
        made: PackedExperts = make(cls, torch.Size(shape), dtype=dtype, device=packed.device, requires_grad=False)
        return made

    def __init__(
        self,
        packed: Tensor,
        absmax: Tensor,
        shape: Any,
        dtype: torch.dtype,
        quant_type: str,
        blocksize: int,
        workspace_mib: float,
    ) -> None:
        self.packed, self.absmax = packed, absmax
        self.quant_type, self.blocksize, self.workspace_mib = quant_type, blocksize, workspace_mib

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def quantised(cls, weight: Tensor, quant_type: str, blocksize: int, workspace_mib: float) -> "PackedExperts":
        """Quantise a weight [E, N, K], expert by expert."""
        of = _bitsandbytes().quantize_4bit
        E, numbers = len(weight), weight[0].numel()
        packed = torch.empty((E, (numbers + 1) // 2), dtype=torch.uint8, device=weight.device)
        absmax = torch.empty((E, -(-numbers // blocksize)), dtype=torch.float32, device=weight.device)
        for e in range(E):
            codes, state = of(weight[e].detach().contiguous(), blocksize=blocksize, quant_type=quant_type)
            packed[e], absmax[e] = codes.flatten(), state.absmax
        return cls(packed, absmax, weight.shape, weight.dtype, quant_type, blocksize, workspace_mib)

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Dequantise experts `first` to `last` - 1: [last - first, N, K], a new tensor."""
        numbers = self.shape[1] * self.shape[2]
        if numbers % self.blocksize and last - first > 1:  # each expert's last block is a short one
            return torch.cat([self.dense(e, e + 1, dtype) for e in range(first, last)])
        made = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
        packed, absmax = (each[first:last].reshape(-1) for each in (self.packed, self.absmax))
        shape, library = torch.Size((last - first, *self.shape[1:])), _bitsandbytes()
        how = {"blocksize": self.blocksize, "quant_type": self.quant_type}
        out: Tensor = library.dequantize_4bit(packed, library.QuantState(absmax, shape, dtype=made, **how))
        return out if made == dtype else out.to(dtype)

    def _mapped(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "PackedExperts":
        """Return another one of parts that a function makes of these."""
        parts = function(self.packed), function(self.absmax)
        return PackedExperts(
            *parts, self.shape, dtype or self.dtype, self.quant_type, self.blocksize, self.workspace_mib
        )

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        how = self.quant_type, self.blocksize, self.workspace_mib
        return ["packed", "absmax"], (tuple(self.shape), self.dtype, *how)

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], how: Any, size: Any, stride: Any) -> "PackedExperts":
        return PackedExperts(parts["packed"], parts["absmax"], *how)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedExperts({tuple(self.shape)}, {self.dtype}, {self.quant_type}, blocksize={self.blocksize})"

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs, aten = kwargs or {}, torch.ops.aten
        self: Any = args[0] if args else None
        if func is aten.select.int and args[1] == 0 and isinstance(self, PackedExperts):
            e = args[2] % self.shape[0] if -self.shape[0] <= args[2] < self.shape[0] else self.shape[0]
            return aten.select.int(self.dense(e, e + 1, self.dtype), 0, 0)
        if func in (aten.detach.default, aten.alias.default):
            return self._mapped(lambda part: part.detach())
        if func in (aten.clone.default, aten.lift_fresh.default):
            return self._mapped(torch.clone)
        if func is aten._to_copy.default:
            device, dtype = kwargs.get("device"), kwargs.get("dtype")
            return self._mapped(lambda part: part.to(device, copy=True), dtype)
        if func is aten.copy_.default and all(isinstance(each, PackedExperts) for each in args[:2]):
            return self._copied(args[1])
        if func is aten.set_.source_Tensor and self is args[1]:
            return self
        if func._schema.is_mutable and any(isinstance(args[place], PackedExperts) for place in _written(func, args)):
            raise RuntimeError(READ_ONLY)

        def whole(packed: PackedExperts) -> Tensor:
            return packed.dense(0, packed.shape[0], packed.dtype)

        return func(*tree_map_only(PackedExperts, whole, args), **tree_map_only(PackedExperts, whole, kwargs))

    def _copied(self, other: "PackedExperts") -> "PackedExperts":
        """Take over what another one holds, as loading a state dict does."""
        ours, theirs = ((each.shape, each.quant_type, each.blocksize) for each in (self, other))
        if ours != theirs:
            raise ValueError(f"these experts are stored as {ours}, what is loaded as {theirs}; quantise them alike")
        self.packed.copy_(other.packed)
        self.absmax.copy_(other.absmax)
        return self


def _written(func: Any, args: tuple[Any, ...]) -> list[int]:
    """Return the places of the arguments that an operator writes to."""
    arguments = func._schema.arguments[: len(args)]
    return [place for place, each in enumerate(arguments) if each.alias_info is not None and each.alias_info.is_write]


class StoredExperts:
    """Weights [E, N, K] of a grouped call, a few dense at a time; not a tensor.

    Args:
        packed: The parameter, [E, N, K] or [E, K, N].
        is_transposed: Whether it is [E, K, N].
    """

    requires_grad = False

    def __init__(self, packed: PackedExperts, is_transposed: bool) -> None:
        self.packed, self.is_transposed = packed, is_transposed
        E, *matrix = packed.shape
        self.shape = torch.Size([E, *(reversed(matrix) if is_transposed else matrix)])
        self.dtype, self.device = packed.dtype, packed.packed.device

    def __len__(self) -> int:
        return self.shape[0]

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Return experts `first` to `last` - 1, [last - first, N, K] in `dtype`."""
        made = self.packed.dense(first, last, dtype)
        return made.mT if self.is_transposed else made

    def groups(self, offsets: Tensor, rows: int, dtype: torch.dtype) -> Iterator[tuple[int, int, slice]]:
        """Yield (first, last, their rows) of experts next to each other that all have rows and fit
        the budget, dense in `dtype`; one of them fits always.

        The offsets are read, which waits for a device: what has no rows is not dequantised.
        """
        _, N, K = self.shape
        most = max(1, int(self.packed.workspace_mib * 2**20) // (N * K * dtype.itemsize))
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


def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions, which take seconds to import."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ImportError(
            f"experts in 4 bits need bitsandbytes: pip install 'delora-kernels[bnb]' ({error})"
        ) from error
