"""Counts what a pass reads and writes: every address that a Triton kernel touches, library GEMMs
whole.

    with Traffic({"x": T * K, "y": T * N}) as traffic: ...
    traffic.read["x"]           how many times over tensors of that many elements were read, summed
                                over launches

Within a launch an address counts once, however many programs touch it: a cache serves the others.
"""

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.functional import linear
from triton.runtime import interpreter

from delora_kernels.autograd import reflection
from delora_kernels.backends import grouped_stages, library_gemm


class Traffic:
    """Passes over tensors of the given sizes; all that is smaller is not counted.

    Args:
        sizes: Name → elements, no two alike.
    """

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self.names = {elements: name for name, elements in sizes.items()}
        assert len(self.names) == len(sizes)
        self.read: Counter[str] = Counter()
        self.written: Counter[str] = Counter()
        self.launches = 0
        self._touched: dict[str, list[np.ndarray]] = {}
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Traffic":
        builder, grid = interpreter.InterpreterBuilder, interpreter.GridExecutor
        load, store, launch = builder.create_masked_load, builder.create_masked_store, grid.__call__

        def counted_load(made: Any, ptrs: Any, mask: Any, *rest: Any) -> Any:
            self._touched["read"].append(ptrs.data[np.asarray(mask.data, dtype=bool)].ravel())
            return load(made, ptrs, mask, *rest)

        def counted_store(made: Any, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
            self._touched["written"].append(ptrs.data[np.asarray(mask.data, dtype=bool)].ravel())
            return store(made, ptrs, value, mask, *rest)

        def counted_launch(launched: Any, *args: Any, **kwargs: Any) -> None:
            self.launches += 1
            self._touched = {"read": [], "written": []}
            launch(launched, *args, **kwargs)
            tensors = [getattr(arg, "base", arg) for arg in (*args, *kwargs.values())]
            for tensor in {t.data_ptr(): t for t in tensors if isinstance(t, Tensor)}.values():
                self._count(tensor)

        self._patch.setattr(builder, "create_masked_load", counted_load)
        self._patch.setattr(builder, "create_masked_store", counted_store)
        self._patch.setattr(grid, "__call__", counted_launch)
        for module in (library_gemm, reflection):
            self._patch.setattr(module, "linear", self._gemm(linear, 2))
        grouped = grouped_stages.grouped_gemm
        mm = torch.mm

        def experts(*args: Any) -> Tensor:  # which runs on a CPU as a GEMM for each expert
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(torch, "mm", mm)
                return grouped(*args)

        self._patch.setattr(grouped_stages, "grouped_gemm", self._gemm(experts, 2))
        self._patch.setattr(torch, "mm", self._gemm(torch.mm, 2))
        self._patch.setattr(Tensor, "addmm_", self._gemm(Tensor.addmm_, 3), raising=False)
        return self

    def __exit__(self, *error: Any) -> None:
        self._patch.undo()

    def _count(self, tensor: Tensor) -> None:
        """Add the part of a tensor that the launch touched, as a share of its elements."""
        name = self.names.get(tensor.numel())
        if name is None:
            return
        first, size = tensor.data_ptr(), tensor.element_size()
        for kind, counter in (("read", self.read), ("written", self.written)):
            addresses = np.unique(np.concatenate([np.empty(0, dtype=np.uint64), *self._touched[kind]]))
            inside = (addresses >= first) & (addresses < first + tensor.numel() * size)
            counter[name] += int(inside.sum()) / tensor.numel()

    def _gemm(self, function: Any, reads: int) -> Any:
        """A library GEMM, counted: each operand is read once, the result is written once, with beta
        = 1 read before.
        """

        def counted(*args: Any, **kwargs: Any) -> Tensor:
            result: Tensor = function(*args, **kwargs)
            self.launches += 1
            for operand in args[:reads]:
                self.read[self.names.get(operand.numel(), "")] += 1
            self.written[self.names.get(result.numel(), "")] += 1
            return result

        return counted
