"""Rows so far apart that no 32-bit number counts the elements between them: the same bits as of
rows side by side.

The memory between rows is never touched, so that it is never there.
"""

import importlib
import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.dropout import drop
from delora_kernels.backends.triton.dy_sums import dy_sums
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.rank_update import rank_update
from delora_kernels.backends.triton.reflect import reflect, reflect_backward
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.backends.triton.scaled import scaled
from delora_kernels.backends.triton.times_small import times_small
from delora_kernels.backends.triton.token_sums import token_sums

T, C, R = 4, 20, 3
APART = 2**31 // (T - 1) + 24

GROUP = MaskGroup(slice(0, R), 0.2, torch.tensor(5))

PASSES: dict[str, Callable[[Tensor, dict[str, Tensor]], Any]] = {
    "times_small": lambda x, m: times_small(x, m["s"], torch.float32, GROUP),
    "token_sums": lambda x, m: token_sums(x, m["h"], sums=True, y=x, group=GROUP),
    "token_sums, h": lambda h, m: token_sums(m["x"], h[:, :R]),
    "dy_sums": lambda dy, m: dy_sums(dy, m["s"], m["h"], 0.5, True, dy),
    "dy_sums, h": lambda h, m: dy_sums(m["x"], m["s"], h[:, :R], 0.5, True, None),
    "rank_update": lambda x, m: rank_update(x, m["h"], m["s"].t(), 0.5, torch.empty_like(m["x"]), extra=x),
    "rank_update, h": lambda h, m: rank_update(None, h[:, :R], m["s"].t(), 0.5, torch.empty_like(m["x"])),
    "rank_gemm": lambda x, m: rank_gemm(x, m["w"].t(), m["h"], m["s"].t(), 0.5),
    "rank_gemm, W by rows": lambda w, m: rank_gemm(m["x"], w.t(), m["h"], m["s"].t()[:, :T], 0.5),
    "rank_gemm, W": lambda w, m: rank_gemm(m["x"][:, :T].contiguous(), w, m["h"], m["s"].t(), 0.5),
    "row_norm": lambda w, m: row_norm(w, m["s"].t(), m["h"], 0.5, torch.ones(T), True),
    "row_norm, W transposed": lambda w, m: row_norm(w.t(), m["h"].t(), m["s"], 0.5, None, False),
    "row_norm of experts": lambda w, m: row_norm(w[:, None], m["a"], m["h"][:, None], 0.5, torch.ones(T, 1), False),
    "scaled": lambda x, m: scaled(x, torch.arange(1.0, C + 1), False),
    "drop": lambda x, m: drop(x, 0.2, torch.tensor(5)),
    "reflect": lambda x, m: reflect(x, m["u"], m["v"], None),
    "reflect_backward": lambda x, m: reflect_backward(x, x, m["u"], m["v"], True),
    "reflect_backward, chunked": lambda x, m: reflect_backward(x, x, m["u"], m["v"], True),
}


@pytest.mark.parametrize("name", PASSES)
def test_rows_far_apart(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("delora_kernels.backends.triton.rank_gemm.DESCRIPTORS_FROM", (99, 0))
    if name.endswith("chunked"):
        module = importlib.import_module("delora_kernels.backends.triton.reflect")
        monkeypatch.setattr(module, "LARGEST", 0)
        monkeypatch.setattr(module, "CHUNK", tables.Tiles(16, 16, 4, 3))
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).half()

    made = {"x": normal(T, C), "h": normal(T, R), "s": normal(C, R), "w": normal(C, C)}
    made |= {"a": normal(T, R, C), "u": normal(2, C // 2), "v": normal(2, C // 2)}
    near = normal(T, C)
    far = torch.empty((T - 1) * APART + C, dtype=near.dtype).as_strided((T, C), (APART, 1))
    assert far[-1].data_ptr() - far.data_ptr() > 2**31 * far.element_size()
    far.copy_(near)
    for got, expected in zip(_tensors(PASSES[name](far, made)), _tensors(PASSES[name](near, made)), strict=True):
        assert torch.equal(got, expected)


def _tensors(found: Any) -> list[Tensor]:
    if isinstance(found, Tensor):
        return [found]
    return [tensor for part in found if part is not None for tensor in _tensors(part)]
