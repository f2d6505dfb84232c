"""The kernels for rows sorted by expert, in small tiles: how rows are cut, what of them is read,
what is added up in parts.
"""

import os
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from grouped_passes import ROWS, Passes, R, check_masks, check_products, check_sums, random_rows
from kernel_calls import DTYPES
from traffic import Traffic

from benchmarks import model
from delora_kernels import functional as F
from delora_kernels import use_backend
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.grouped import grouped_times_small, grouped_update
from delora_kernels.backends.triton.grouped_sums import grouped_sums
from delora_kernels.backends.triton.row_norm import row_norm
from delora_kernels.testing import METHODS, measure
from delora_kernels.testing.errors import relative_error


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several for an expert, and several experts in the rows of one."""
    for name in [name for name in tables.TABLES if name.startswith("grouped_")]:
        monkeypatch.setitem(tables.TABLES, name, {"16": tables.Tiles(16, 16, 4, 1)})


PASSES = Passes("triton", grouped_times_small, grouped_update, grouped_sums)


@pytest.mark.parametrize("rank", [R, 20])
@pytest.mark.parametrize("rows", ROWS)
def test_products_of_each_experts_rows(rows: str, rank: int, seed: int) -> None:
    check_products(PASSES, ROWS[rows], rank, seed)


@pytest.mark.parametrize("target", [1, 8, 1000])
@pytest.mark.parametrize("rows", ROWS)
def test_sums_of_each_experts_rows(rows: str, target: int, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In one piece and in parts, of which no expert sees another's."""
    monkeypatch.setattr(tables, "SPLIT_TARGET", target)
    check_sums(PASSES, ROWS[rows], seed)


def test_random_divisions_of_the_rows(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(8):
        rows = random_rows(generator, most=9)
        monkeypatch.setattr(tables, "SPLIT_TARGET", int(torch.randint(1, 40, (), generator=generator)))
        check_products(PASSES, rows, 2, seed)
        check_sums(PASSES, rows, seed)


def test_masks_are_those_of_sorted_rows(seed: int) -> None:
    check_masks(PASSES, seed)


E = 5


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
    if nobodys == 0:  # what the cost model counts
        counted = [sum((t.read[n] + t.written[n]) * size for n, size in sizes.items()) for t in (forward, backward)]
        modelled = [sum(step.bytes for step in model.experts(T, K, N, E, R, 1, wide)) for wide in (False, True)]
        assert counted == pytest.approx([modelled[0], modelled[1] - modelled[0]])
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


@pytest.mark.parametrize("dtype", ["float32", "bfloat16+float32"])
@pytest.mark.parametrize("method", [name for name in METHODS if name.startswith("grouped")])
def test_method(method: str, dtype: str, seed: int) -> None:
    """y and every gradient by the autograd Function on this backend."""
    narrow, wide = DTYPES[dtype]
    with use_backend("triton"):
        problem = METHODS[method].problem(30, 24, 20, 5, dtype=narrow, adapter_dtype=wide, seed=seed)
        assert [m for m in measure(problem) if not m.ok] == []


def test_norms_of_all_experts_by_one_launch(seed: int) -> None:
    """DoRA's: each W is read once, whatever the experts have of the rows; W as it lies, transposed
    too.
    """
    T, K, N = 40, 24, 40
    made = arguments(seed, T, K, N)
    made["magnitude"] = torch.ones(E, N)
    wide = made["weight"].float() + 0.5 * made["B"].float() @ made["A"].float()
    for weight in (made["weight"], made["weight"].mT.contiguous().mT):
        with Traffic({"W": E * N * K}) as traffic:
            norm, c, _ = row_norm(weight, made["A"], made["B"], 0.5, made["magnitude"], False)
        assert (traffic.launches, traffic.read["W"], traffic.written["W"]) == (1, 1, 0)
        torch.testing.assert_close(norm, wide.norm(dim=2), rtol=1e-5, atol=0)
        torch.testing.assert_close(c, 1 / wide.norm(dim=2), rtol=1e-5, atol=0)
    with use_backend("triton"), Traffic({"W": E * N * K}) as traffic:
        F.grouped_dora_linear(**made)
    assert traffic.launches == 4  # norms, h, GEMM, update
