"""Merging of the library's own methods: the base weight itself is kept, and given back bit for bit.

What is kept follows the layer to other devices and dtypes, copies and files. What was written is
remembered by the sums of its bits, so that a weight that something else has changed since is
noticed: then the adapters' update alone is taken away again, or, where it can't be told any more,
nothing is touched.
"""

import warnings
from collections.abc import Callable
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from delora_kernels.bases.stored import why_not_merged
from delora_kernels.dtypes import accumulate_dtype
from delora_kernels.integrations.peft.methods.adapted_base import is_stored, weight_of

Sums = tuple[Tensor, Tensor]
_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class MergesAndKeeps:
    """What a tuner layer does with its base's weight: read it as [N, K], put a merged one there,
    and give it back.

    Comes before nn.Module and BaseTunerLayer among the bases of a layer, which says what `_merged`
    makes of a weight.
    """

    merged: bool
    merged_adapters: list[str]
    get_base_layer: Any
    base_layer: Any
    additive = True
    """Whether the method adds to the output of the base layer, whatever that is."""
    _unmerged: Tensor | None = None
    """The base's weight, as it is stored, without the adapters."""
    _written: Sums | None = None
    """Of the merged weight, as `unmerge` expects to find it."""
    _together: list[list[str]]
    """The adapters of each merge."""

    def unmerge(self) -> None:
        """Give the base layer its own weight back, bit for bit; if it has changed since, without
        the adapters' update.

        Raises:
            RuntimeError: it has changed since, and so have the adapters, or its dtype; nothing is
                touched.
        """
        if not self.merged or self._unmerged is None:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        self.get_base_layer().weight.data = self._without_adapters(self._unmerged)
        self._unmerged = self._written = None
        self._together = []
        self.merged_adapters.clear()

    def _merged(self, weight: Tensor, adapter_names: list[str]) -> Tensor:
        """Return what merging `adapter_names` makes of a weight [N, K], in whatever dtype."""
        raise NotImplementedError

    @torch.no_grad()
    def _merge(self, adapter_names: list[str], safe_merge: bool) -> None:
        """Make the merged weight, rounded to its dtype, the base's, and keep the base's own for
        `unmerge`.
        """
        if not adapter_names:
            return
        base, inner = self.get_base_layer(), self.base_layer
        if is_stored(base):
            raise ValueError(f"merge: {adapter_names} {why_not_merged(base)}")
        if isinstance(inner, BaseTunerLayer) and not (self.additive and getattr(inner, "additive", True)):
            waiting = [] if inner.merged or inner.disable_adapters else inner.active_adapters
            if waiting:
                raise RuntimeError(
                    f"merge: {adapter_names} stand around a {type(inner).__name__} whose adapters {waiting} are not "
                    "merged: in the weight they would come in another order; merge those first"
                )
        merged = self._stored(self._merged(self._base_weight(), adapter_names), base.weight.dtype)
        if safe_merge and not bool(merged.isfinite().all()):
            raise ValueError(f"NaNs detected in the merged weights: an adapter of {adapter_names} seems to be broken")
        kept = base.weight.data if self._unmerged is None else self._without_adapters(self._unmerged)
        self._together = [*(self._together if self._unmerged is not None else ()), list(adapter_names)]
        self._unmerged = kept
        base.weight.data = merged
        self._written = sums_of_bits(merged)
        self.merged_adapters.extend(adapter_names)

    @torch.no_grad()
    def _without_adapters(self, kept: Tensor) -> Tensor:
        """Return the base weight as it would be without what is merged: `kept`, unless it has
        changed since.
        """
        now = self.get_base_layer().weight.data
        if self._is_written(now):
            return kept
        merged = kept
        if not kept.is_meta and now.shape == kept.shape and now.device == kept.device and now.dtype == kept.dtype:
            for names in self._together:
                merged = self._stored(self._merged(self._seen(merged), names), kept.dtype)
        if merged is kept or not self._is_written(merged):
            raise RuntimeError(
                f"unmerge: the base weight has changed since {self.merged_adapters} were merged, and so have the "
                "adapters (or its dtype or device, but not through the layer), so their update can't be told any more; "
                "nothing was changed. Put the merged weight back, or load the base model anew"
            )
        warnings.warn(
            f"the base weight has changed since {self.merged_adapters} were merged: their update is subtracted from "
            "what it is now",
            stacklevel=3,
        )
        dtype = accumulate_dtype(kept.dtype)
        return (now.to(dtype) - (merged.to(dtype) - kept.to(dtype))).to(now.dtype)

    def _is_written(self, weight: Tensor) -> bool:
        """Whether a weight is the merged one, bit for bit."""
        written = self._written
        if written is None or weight.is_meta or written[0].is_meta:
            return False
        found = sums_of_bits(weight)
        return all(torch.equal(a, b.to(a.device)) for a, b in zip(found, written, strict=True))

    def _apply(self, fn: Callable[[Tensor], Tensor], *args: Any, **kwargs: Any) -> Any:
        """Take what is kept along to other devices and dtypes."""
        intact = self._unmerged is not None and self._is_written(self.get_base_layer().weight.data)
        result = super()._apply(fn, *args, **kwargs)  # type: ignore[misc]
        if self._unmerged is not None:
            with torch.no_grad():
                self._unmerged = fn(self._unmerged)
            if intact:
                self._written = sums_of_bits(self.get_base_layer().weight.data)
        return result

    def _stored(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        """Return a weight [N, K] as the base layer stores it."""
        return self._seen(weight.to(dtype)).contiguous()

    def _seen(self, weight: Tensor) -> Tensor:
        """Return a weight as the base layer stores it as [N, K], and the other way round."""
        return weight.t() if type(self.get_base_layer()).__name__ == "Conv1D" else weight

    def _base_weight(self) -> Tensor:
        """W, [N, K]; of a base in few bits what it is dequantised to."""
        return weight_of(self.get_base_layer())


def sums_of_bits(weight: Tensor) -> Sums:
    """Return the sums over rows and over columns of a matrix's numbers read as integers: another
    matrix has others.

    (But for changes that cancel in every row and every column, which rounding, training and loading
    don't make.)
    """
    bits = weight.detach().view(_INTEGERS[weight.element_size()])
    return bits.sum(0, dtype=torch.int64), bits.sum(1, dtype=torch.int64)
