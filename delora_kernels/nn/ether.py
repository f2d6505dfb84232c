"""EtherLinear and EtherPlusLinear: a frozen linear between trainable block reflections."""

import math
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from delora_kernels import checks, functional
from delora_kernels.autograd.reflection import reflected_weight
from delora_kernels.nn.base import BaseOptions, MergeableLinear

SIDES = ("input", "output", "both")


class _EtherBase(MergeableLinear):
    """What EtherLinear and EtherPlusLinear share: vectors for each side and block, and W' = H_out W
    H_in.
    """

    _NAMES: tuple[str, ...]
    _SIDE: str
    _function: Any

    def __init__(
        self,
        in_features: int,
        out_features: int,
        n_blocks: int = 1,
        *,
        side: str | None = None,
        blocks: str = "paper",
        **base: Unpack[BaseOptions],
    ) -> None:
        super().__init__(in_features, out_features, **base)
        kind = type(self).__name__
        self.side = checks.option(kind, "side", self._SIDE if side is None else side, SIDES)
        self.blocks = checks.option(kind, "blocks", blocks, ("paper", "official"))
        self.n_blocks = n_blocks
        for suffix, features, without in (("", in_features, "output"), ("_out", out_features, "input")):
            if self.side != without:
                check_blocks(kind, n_blocks, features, "out_features" if suffix else "in_features")
            for name in self._NAMES:
                vectors = None
                if self.side != without:
                    vectors = nn.Parameter(torch.empty(n_blocks, features // n_blocks, **self._trained_as))
                self.register_parameter(name + suffix, vectors)
        self.reset_parameters()

    def extra_repr(self) -> str:
        """Show the arguments that made the module, as nn.Linear prints its own."""
        return f"{super().extra_repr()}, n_blocks={self.n_blocks}, side={self.side!r}, blocks={self.blocks!r}"

    def _vectors(self) -> dict[str, Tensor]:
        """Return the vectors that there are, by argument name."""
        names = [name + suffix for suffix in ("", "_out") for name in self._NAMES]
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    def _reset_adapter(self) -> None:
        for name, vectors in self._vectors().items():
            if name.startswith("u"):
                nn.init.kaiming_uniform_(vectors, a=math.sqrt(5))

    def _adapted(self, x: Tensor, dropout_p: float) -> Tensor:
        x = nn.functional.dropout(x, dropout_p) if dropout_p else x
        y: Tensor = type(self)._function(x, self._call_weight(), bias=self.bias, blocks=self.blocks, **self._vectors())
        return y

    def _merged_weight(self) -> Tensor:
        """H_out W H_in, in float32 or wider, rounded once."""
        return reflected_weight(self.weight, self.blocks, **self._vectors()).to(self.weight.dtype).contiguous()


class EtherLinear(_EtherBase):
    """A frozen linear between block reflections.

        y = H_out W H_in drop(x) + bias,   H = blockdiag(I − 2 û_i û_iᵀ)

    The vectors start Kaiming uniform (a = √5), as in the authors' code: **y does not start as the
    frozen linear's**, every block is at distance ‖H_i − I‖_F = 2 from the identity, always. Merged:
    W' = H_out W H_in. A reflection is its own inverse, so `unmerge` after merge(keep_weight=False)
    reflects again: W up to rounding, with the vectors as they were.

    Args:
        in_features: K.
        out_features: N.
        n_blocks: Blocks of each reflected side; divides its features.
        side: "input" (`u`, as in the paper; the default), "output" (`u_out`, the authors'
            flip_side) or "both".
        blocks: "paper" or "official" (what the authors' code does with several blocks on the input
            side).
        bias: Give the base a bias.
        dropout_p: Probability of dropping an element of the whole layer's input, in [0, 1); only in
            training mode.
        adapter_dtype: Dtype of the vectors. None: float32 for a float16 or bfloat16 base, else the
            base's.
        device: Device of every tensor.
        dtype: Dtype of the base, which is initialised as nn.Linear's and frozen.

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al., "ETHER: Efficient Finetuning of Large-Scale Models with Hyperplane
    Reflections" (arXiv:2405.20271); mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """

    _NAMES = ("u",)
    _SIDE = "input"
    _function = functional.ether_linear

    def unmerge(self) -> None:
        """Take the reflections out of the weight: W itself where `merge` kept it, else W' reflected
        again.

        Raises:
            RuntimeError: the adapter is not merged.
        """
        if self.base_weight is None or self.base_weight.dim() == 2:
            super().unmerge()
            return
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(self.weight.device.type, enabled=False):
            self.weight = nn.Parameter(self._merged_weight(), requires_grad=False)
        self.base_weight = None


class EtherPlusLinear(_EtherBase):
    """A frozen linear between relaxed block reflections.

        y = H_out W H_in drop(x) + bias,   H = blockdiag(I − û_i û_iᵀ + v̂_i v̂_iᵀ)

    u starts Kaiming uniform (a = √5) and v at −u, as in the authors' code: y starts as the frozen
    linear's, up to rounding. ‖H_i − I‖_F ≤ √2. Merged: W' = H_out W H_in; H can be singular, so
    `unmerge` needs the weight that `merge` keeps by default.

    Args:
        in_features, out_features, n_blocks, blocks, bias, dropout_p, adapter_dtype, device,
            dtype: as in `EtherLinear`.
        side: "both" (`u`, `v`, `u_out`, `v_out`, as in the paper; the default), "input" (`u`, `v`)
            or "output".

    Raises:
        TypeError, ValueError: an argument does not fit; the text names it and the remedy.

    Source: Bini et al. (arXiv:2405.20271), ETHER+; mwbini/ether, `ether-instruct/lit_gpt/ether.py`.
    """

    _NAMES = ("u", "v")
    _SIDE = "both"
    _function = functional.ether_plus_linear

    def _reset_adapter(self) -> None:
        super()._reset_adapter()
        with torch.no_grad():
            for name, vectors in self._vectors().items():
                if name.startswith("v"):
                    vectors.copy_(-getattr(self, name.replace("v", "u")))


def check_blocks(kind: str, n_blocks: Any, features: int, what: str) -> None:
    """Check that `n_blocks` is an int that divides `features`, which the error calls `what`."""
    if isinstance(n_blocks, bool) or not isinstance(n_blocks, int):
        raise checks.fail(TypeError, kind, "n_blocks", "an int", type(n_blocks).__name__, "pass a number of blocks")
    if n_blocks < 1 or features % n_blocks:
        raise checks.fail(ValueError, kind, "n_blocks", f"a divisor of {what} = {features}", n_blocks, "pass one")
