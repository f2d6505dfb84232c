"""The kernels for rows sorted by expert, in small tiles: how rows are cut, what of them is read,
what is added up in parts.
"""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from torch import Tensor
from traffic import Traffic

from delora_kernels import functional as F
from delora_kernels import ops, use_backend
from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.grouped import grouped_times_small, grouped_update
from delora_kernels.backends.triton.grouped_sums import grouped_sums
from delora_kernels.testing.errors import relative_error

E, C, R = 5, 21, 3
ROWS = {
    "some of each": [7, 1, 16, 3, 9],
    "empty ones": [0, 20, 0, 0, 17],
    "one has all": [0, 0, 40, 0, 0],
    "whole tiles": [16, 32, 0, 16, 16],
    "no rows": [0, 0, 0, 0, 0],
}
NOBODYS = 5


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for an expert, and several experts in the rows of one."""
    for name in ("grouped_times_small", "grouped_update", "grouped_sums"):
        monkeypatch.setitem(tables.TABLES, name, {"16": tables.Tiles(16, 16, 4, 1)})
    monkeypatch.delitem(tables.TABLES, "grouped_sums fp32")


def drawn(rows: list[int], seed: int, rank: int = R) -> tuple[Tensor, Tensor, Tensor, Tensor, list[slice]]:
    """x and h, NaN in rows that are nobody's; a small matrix of each expert; offsets; the experts'
    rows.
    """
    generator = torch.Generator().manual_seed(seed)
    T = sum(rows) + NOBODYS
    x, h = (torch.randn(T, width, generator=generator) for width in (C, rank))
    x[-NOBODYS:], h[-NOBODYS:] = torch.nan, torch.nan
    ends = torch.tensor(rows).cumsum(0)
    slices = [slice(int(end) - count, int(end)) for end, count in zip(ends, rows, strict=True)]
    return x, h, torch.randn(E, C, rank, generator=generator), ends, slices


@pytest.mark.parametrize("rank", [R, 20])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_each_experts_rows(rows: str, rank: int, seed: int) -> None:
    x, h, small, ends, slices = drawn(ROWS[rows], seed, rank)
    found = grouped_times_small(x, small, ends, 0.5, torch.float32)
    out, bias = torch.full_like(x, 2.0), torch.arange(E * C).view(E, C).float()
    out[-NOBODYS:] = torch.nan
    grouped_update(out, h, small.mT, ends.int(), bias)
    for e, mine in enumerate(slices):
        torch.testing.assert_close(found[mine], 0.5 * x[mine] @ small[e], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[mine], 2.0 + h[mine] @ small[e].T + bias[e], rtol=1e-5, atol=1e-5)
    assert not found[-NOBODYS:].any()
    assert not out[-NOBODYS:].any()


@pytest.mark.parametrize("target", [1, 8, 1000])
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_each_experts_rows(rows: str, target: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in parts, of which no expert sees another's; the same bits every time."""
    monkeypatch.setattr(tables, "SPLIT_TARGET", target)
    x, h, _, ends, slices = drawn(ROWS[rows], seed)
    product, sums = grouped_sums(x, h, ends, True)
    assert product is not None
    assert sums is not None
    for e, mine in enumerate(slices):
        torch.testing.assert_close(product[e], h[mine].T @ x[mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[e], x[mine].sum(0), rtol=1e-5, atol=1e-5)
    again = (*grouped_sums(x, h, ends, True), grouped_sums(x, h, ends)[0], grouped_sums(x, None, ends, True)[1])
    assert all(torch.equal(a, b) for a, b in zip((product, sums, product, sums), again, strict=True))


def test_random_divisions_of_the_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every pass on random numbers of rows, by random numbers of experts."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(12):
        experts = int(torch.randint(1, 9, (), generator=generator))
        counts = torch.randint(0, 40, (experts,), generator=generator)
        counts *= torch.rand(experts, generator=generator) < 0.7
        ends, T = counts.cumsum(0), int(counts.sum()) + 3
        monkeypatch.setattr(tables, "SPLIT_TARGET", int(torch.randint(1, 40, (), generator=generator)))
        x, h = torch.randn(T, 9, generator=generator), torch.randn(T, 2, generator=generator)
        small = torch.randn(experts, 9, 2, generator=generator)
        found, product = grouped_times_small(x, small, ends, 1.0, torch.float32), grouped_sums(x, h, ends)[0]
        out = torch.zeros(T, 9)
        grouped_update(out, h, small.mT, ends)
        assert product is not None
        for e, end in enumerate(ends.tolist()):
            mine = slice(end - int(counts[e]), end)
            torch.testing.assert_close(found[mine], x[mine] @ small[e], rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(out[mine], h[mine] @ small[e].T, rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(product[e], h[mine].T @ x[mine], rtol=1e-5, atol=1e-5)


def test_masks_are_those_of_sorted_rows(seed: int) -> None:
    """Of x where it is read, of the term where it is added: the bits of `dropout_mask`."""
    x, h, small, ends, slices = drawn(ROWS["some of each"], seed)
    group = MaskGroup(slice(0, R), 0.4, torch.tensor(seed))
    kept = ops.dropout_mask(len(x), C, 0.4, torch.tensor(seed), "triton") / 0.6
    found = grouped_times_small(x, small, ends, 1.0, torch.float32, group)
    product, sums = grouped_sums(x, h, ends, True, group)
    assert product is not None
    assert sums is not None
    out = torch.ones_like(x)
    grouped_update(out, h, small.mT, ends, None, group)
    for e, mine in enumerate(slices):
        torch.testing.assert_close(found[mine], (kept * x)[mine] @ small[e], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(product[e], h[mine].T @ (kept * x)[mine], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(sums[e], x[mine].sum(0), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(out[mine], 1 + kept[mine] * (h[mine] @ small[e].T), rtol=1e-5, atol=1e-5)


def arguments(seed: int, T: int, K: int, N: int, nobodys: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    made: dict[str, Any] = {"x": (T, K), "weight": (E, N, K), "A": (E, R, K), "B": (E, N, R), "bias": (E, N)}
    made = {name: torch.randn(*size, generator=generator).bfloat16() for name, size in made.items()}
    ends = torch.tensor([0, 20, 20, T - 9, T])
    return made | {"offsets": ends - nobodys * (ends > T - nobodys), "scale": 0.5}


FORWARD = {"x": 2, "W": 1, "y": 1}, {"y": 2}
BACKWARD = {"y": 3, "W": 1, "x": 2}, {"x": 2}
"""Reads and writes: the frozen experts' own, x for h, y for its update; dy for dv and for dB̂, x for
dÂ, dx for its update.
"""


@pytest.mark.parametrize("nobodys", [0, 4])
def test_passes_and_launches(nobodys: int, seed: int) -> None:
    T, K, N = 96, 56, 72
    made = arguments(seed, T, K, N, nobodys)
    for name in ("x", "A", "B", "bias"):
        made[name].requires_grad_()
    sizes, dy = {"x": T * K, "y": T * N, "W": E * N * K}, torch.ones(T, N).bfloat16()
    with use_backend("triton"):
        with Traffic(sizes) as forward:
            y = F.grouped_lora_linear(**made)
        with Traffic(sizes) as backward:
            y.backward(dy)
    part = nobodys / T  # of what our passes read nobody's rows are none; they are written, as zeros
    ours = {"x": 1, "y": 1}, {"y": 2, "x": 2}
    for traffic, (read, written), mine in zip((forward, backward), (FORWARD, BACKWARD), ours, strict=True):
        assert {name: traffic.read[name] for name in read} == pytest.approx(
            {name: count - part * mine.get(name, 0) for name, count in read.items()}
        )
        assert {name: traffic.written[name] for name in sizes if traffic.written[name]} == written
    # h, GEMM, update; dv, dB̂ and its parts, dÂ and its parts, GEMM, update
    assert (forward.launches, backward.launches) == (3, 7)


def test_values_beside_the_eager_backend(seed: int) -> None:
    made, results = arguments(seed, 96, 56, 72, 4), []
    for backend in ("eager", "triton"):
        leaves = {name: made[name].detach().clone().requires_grad_() for name in ("x", "A", "B", "bias")}
        with use_backend(backend):
            y = F.grouped_lora_linear(**made | leaves)
            results.append((y, *torch.autograd.grad(y.float().square().sum(), [*leaves.values()])))
    for ours, theirs in zip(*reversed(results), strict=True):
        assert relative_error(ours, theirs.double()) <= 4 * torch.finfo(torch.bfloat16).eps
