"""EtherLinear and EtherPlusLinear: a frozen linear between trainable block reflections."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from delora_kernels import checks, functional, ops
from delora_kernels.nn.base import AdapterLinear, row_chunks

SIDES = ("input", "output", "both")


class ReflectedLinear(AdapterLinear):
    """What EtherLinear and EtherPlusLinear share: vectors for each side and block, and W' = H_out W H_in."""

    u: nn.Parameter | None
    u_out: nn.Parameter | None
    _names: tuple[str, ...] = ("u",)

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n: int,
        *,
        side: str,
        blocks: str,
        bias: bool,
        dropout_p: float,
        adapter_dtype: torch.dtype | None,
        device: torch.device | str | int | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__(
            in_features,
            out_features,
            None,
            bias=bias,
            dropout_p=dropout_p,
            adapter_dtype=adapter_dtype,
            device=device,
            dtype=dtype,
        )
        kind = type(self).__name__
        self.side = checks.option(kind, "side", side, SIDES)
        self.blocks = checks.option(kind, "blocks", blocks, ("paper", "official"))
        self.n = n
        for suffix, features, absent in (("", in_features, "output"), ("_out", out_features, "input")):
            if side != absent:
                _check_blocks(kind, n, features, "out_features" if suffix else "in_features")
            for name in self._names:
                shape = None if side == absent else (n, features // n)
                empty = None if shape is None else torch.empty(shape, device=device, dtype=self.adapter_dtype)
                self.register_parameter(name + suffix, None if empty is None else nn.Parameter(empty))
        self.reset_parameters()

    def extra_repr(self) -> str:
        """The arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, n={self.n}, side={self.side!r}, blocks={self.blocks!r}"

    def _vectors(self) -> dict[str, Tensor]:
        """The vectors that there are, by name."""
        names = [*self._names, *(f"{name}_out" for name in self._names)]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _reset_adapter(self) -> None:
        for suffix in ("", "_out"):
            u = getattr(self, f"u{suffix}")
            if u is not None:
                nn.init.kaiming_uniform_(u, a=math.sqrt(5))

    def _adapted(self, x: Tensor, dropout_p: float) -> Tensor:
        x = nn.functional.dropout(x, dropout_p)
        return self._function(x, self.weight, bias=self.bias, blocks=self.blocks, **self._vectors())

    def _function(self, x: Tensor, weight: Tensor, **arguments: Any) -> Tensor:
        raise NotImplementedError

    def _merged_weight(self) -> Tensor:
        """H_out (W H_in), the columns of W first, then its rows, in a wider dtype; rounded once."""
        return self._reflected_weight(self.weight)

    def _reflected_weight(self, weight: Tensor) -> Tensor:
        dtype = self._vector_dtype
        vectors = {name: value.detach().to(dtype) for name, value in self._vectors().items()}
        into, out_of = ((vectors.get(f"u{suffix}"), vectors.get(f"v{suffix}")) for suffix in ("", "_out"))
        if self.blocks == "official" and self.n > 1 and into[0] is not None:
            eye = torch.eye(self.in_features, dtype=dtype, device=weight.device)
            arguments = {name: value for name, value in vectors.items() if not name.endswith("_out")}
            turned = self._function(eye, weight.to(dtype), blocks="official", **arguments).t()
        elif into[0] is not None:
            turned = _reflected(weight, *into, dtype)
        else:
            turned = weight.to(dtype)
        if out_of[0] is not None:
            turned = ops.reflect(turned.t(), out_of[0], out_of[1], None, "eager").t()
        return turned.to(weight.dtype).contiguous()


def _reflected(weight: Tensor, u: Tensor, v: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of W reflected, in `dtype`."""
    return ops.reflect(weight.to(dtype), u, v, None, "eager")
