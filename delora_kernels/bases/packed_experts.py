"""The 3-D weights of an expert model in bitsandbytes' 4-bit blocks, one expert after the other.

`PackedExperts` stands in the place of the parameter [E, N, K]: a tensor that has its shape, dtype
and device, and holds packed [E, N K / 2] and absmax [E, N K / blocksize], of double quantisation
this in 8 bits, with a scale for 256 of them and a mean for each expert. bitsandbytes has no such
parameter (its linears are modules, and its parametrization makes the whole of it dense at every
look). One expert of it (`weight[3]`) is dequantised alone, to a copy; any other computation sees
all of it, dequantised. A write to it raises; slices and views of it are dense copies, and what is
written to such a copy is lost with it.
"""

import importlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

QUANT_TYPES = ("nf4", "fp4")
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
READ_ONLY = (
    "a weight of experts that is stored in 4 bits can't be written to, for rounding would take an adapter away: export "
    "the adapter (export_lora), or merge it into the model loaded in 16 bits"
)


class Storing(NamedTuple):
    """How experts are stored.

    Args:
        quant_type: "nf4" or "fp4".
        blocksize: Numbers that share one of absmax.
        workspace_mib: Budget of the dense experts that are there at a time.
        double_quant: Whether absmax is stored in 8 bits, `NESTED` of them sharing a scale.
    """

    quant_type: str = "nf4"
    blocksize: int = 64
    workspace_mib: float = 256
    double_quant: bool = False


NESTED = 256
"""Numbers of absmax that share a scale where these are quantised too: bitsandbytes' choice."""


class PackedExperts(Tensor):
    """A weight [E, N, K] in blocks of 4-bit numbers.

    Args:
        parts: packed: uint8, [E, ⌈N K / 2⌉]; absmax: float32, [E, n], n = ⌈N K / blocksize⌉. Of
            double quantisation absmax is uint8, and `scales` float32 [E, ⌈n / 256⌉] and `means`
            float32 [E] stand behind it.
        shape: E, N, K.
        dtype: What it is dequantised to, and was quantised from.
        storing: How.
    """

    packed: Tensor
    absmax: Tensor
    scales: Tensor
    means: Tensor
    storing: Storing

    @staticmethod
    def __new__(cls, parts: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, storing: Storing) -> "PackedExperts":
        make: Any = Tensor._make_wrapper_subclass
        made: PackedExperts = make(cls, torch.Size(shape), dtype=dtype, device=parts[0].device, requires_grad=False)
        return made

    def __init__(self, parts: tuple[Tensor, ...], shape: Any, dtype: torch.dtype, storing: Storing) -> None:
        for name, part in zip(_names(storing), parts, strict=True):
            setattr(self, name, part)
        self.storing = storing

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def quantised(cls, weight: Tensor, storing: Storing) -> "PackedExperts":
        """Quantise a weight [E, N, K], expert by expert."""
        of = _bitsandbytes().quantize_4bit
        E, numbers = len(weight), weight[0].numel()
        n = -(-numbers // storing.blocksize)
        sizes: dict[str, tuple[torch.dtype, int]] = {"packed": (torch.uint8, (numbers + 1) // 2)}
        sizes["absmax"] = (torch.uint8 if storing.double_quant else torch.float32, n)
        sizes |= {"scales": (torch.float32, -(-n // NESTED)), "means": (torch.float32, 1)}
        new = {
            name: torch.empty((E, sizes[name][1]), dtype=sizes[name][0], device=weight.device)
            for name in _names(storing)
        }
        how = {"blocksize": storing.blocksize, "quant_type": storing.quant_type}
        for e in range(E):
            codes, state = of(weight[e].detach().contiguous(), compress_statistics=storing.double_quant, **how)
            new["packed"][e], new["absmax"][e] = codes.flatten(), state.absmax
            if storing.double_quant:
                new["scales"][e], new["means"][e] = state.state2.absmax, state.offset
        return cls(tuple(new.values()), weight.shape, weight.dtype, storing)

    def parts(self) -> tuple[Tensor, ...]:
        """Return what it holds, in the order in which it is made of them."""
        return tuple(getattr(self, name) for name in _names(self.storing))

    @property
    def held_bytes(self) -> int:
        """What it takes."""
        return sum(part.numel() * part.itemsize for part in self.parts())

    def dense(self, first: int, last: int, dtype: torch.dtype) -> Tensor:
        """Dequantise experts `first` to `last` - 1: [last - first, N, K], a new tensor."""
        numbers, blocksize = self.shape[1] * self.shape[2], self.storing.blocksize
        if numbers % blocksize and last - first > 1:  # each expert's last block is a short one
            return torch.cat([self.dense(e, e + 1, dtype) for e in range(first, last)])
        made = dtype if dtype in (torch.float16, torch.bfloat16, torch.float32) else torch.float32
        packed, absmax = self.packed[first:last].reshape(-1), self._absmax(first, last).reshape(-1)
        shape, library = torch.Size((last - first, *self.shape[1:])), _bitsandbytes()
        how = {"blocksize": blocksize, "quant_type": self.storing.quant_type}
        out: Tensor = library.dequantize_4bit(packed, library.QuantState(absmax, shape, dtype=made, **how))
        return out if made == dtype else out.to(dtype)

    def _absmax(self, first: int, last: int) -> Tensor:
        """Return the scales of the experts' blocks, float32 [last - first, n]."""
        codes = self.absmax[first:last]
        if not self.storing.double_quant:
            return codes
        if codes.shape[1] % NESTED and last - first > 1:
            return torch.cat([self._absmax(e, e + 1) for e in range(first, last)])
        of, scales = _bitsandbytes().dequantize_blockwise, self.scales[first:last]
        wide: Tensor = of(codes.reshape(-1), absmax=scales.reshape(-1), blocksize=NESTED)
        return wide.view(codes.shape).add_(self.means[first:last])

    def _mapped(self, function: Callable[[Tensor], Tensor], dtype: torch.dtype | None = None) -> "PackedExperts":
        """Return another one of parts that a function makes of these."""
        return PackedExperts(tuple(map(function, self.parts())), self.shape, dtype or self.dtype, self.storing)

    def __tensor_flatten__(self) -> tuple[list[str], Any]:
        return list(_names(self.storing)), (tuple(self.shape), self.dtype, tuple(self.storing))

    @staticmethod
    def __tensor_unflatten__(parts: dict[str, Tensor], how: Any, size: Any, stride: Any) -> "PackedExperts":
        shape, dtype, storing = how
        return PackedExperts(tuple(parts.values()), shape, dtype, Storing(*storing))

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"PackedExperts({tuple(self.shape)}, {self.dtype}, {self.storing})"

    @property
    def data(self) -> Tensor:
        """Return it without its history; assigned may be another one alone, which it then holds."""
        own: Tensor = Tensor.data.__get__(self)  # type: ignore[attr-defined]
        return own

    @data.setter
    def data(self, new: Tensor) -> None:
        if not isinstance(new, PackedExperts):
            raise RuntimeError(READ_ONLY)  # torch would change the shape, and leave the numbers
        Tensor.data.__set__(self, new)  # type: ignore[attr-defined]
        for name in _names(self.storing):
            delattr(self, name)
        for name, part in zip(_names(new.storing), new.parts(), strict=True):
            setattr(self, name, part)
        self.storing = new.storing

    def __setitem__(self, index: Any, value: Any) -> None:
        raise RuntimeError(READ_ONLY)  # it would go to the copy that indexing gives

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
        if func._schema.is_mutable and any(isinstance(each, PackedExperts) for each in _written(func, args, kwargs)):
            raise RuntimeError(READ_ONLY)

        def whole(packed: PackedExperts) -> Tensor:
            return packed.dense(0, packed.shape[0], packed.dtype)

        return func(*tree_map_only(PackedExperts, whole, args), **tree_map_only(PackedExperts, whole, kwargs))

    def _copied(self, other: "PackedExperts") -> "PackedExperts":
        """Take over what another one holds, as loading a state dict does."""
        ours, theirs = ((tuple(each.shape), each.storing._replace(workspace_mib=0)) for each in (self, other))
        if ours != theirs:
            raise ValueError(f"these experts are stored as {ours}, what is loaded as {theirs}; quantise them alike")
        for part, new in zip(self.parts(), other.parts(), strict=True):
            part.copy_(new)
        return self


def _names(storing: Storing) -> tuple[str, ...]:
    """Return the names of the tensors that hold it."""
    return ("packed", "absmax", "scales", "means") if storing.double_quant else ("packed", "absmax")


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[Any]:
    """Yield what an operator writes to: an argument, each of a list (`_foreach_*`), `out`."""
    for place, each in enumerate(func._schema.arguments):
        if each.alias_info is not None and each.alias_info.is_write:
            given = args[place] if place < len(args) else kwargs.get(each.name)
            yield from given if isinstance(given, (list, tuple)) else (given,)


def _bitsandbytes() -> Any:
    """Return bitsandbytes' functions, which take seconds to import."""
    try:
        return importlib.import_module("bitsandbytes.functional")
    except ImportError as error:
        raise ImportError(
            f"experts in 4 bits need bitsandbytes: pip install 'delora-kernels[bnb]' ({error})"
        ) from error
