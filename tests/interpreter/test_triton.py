"""Triton's kernels in its interpreter, on CPU tensors: every op and method against its formula,
forward and backward.

Run by `make test-interpreter`: TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import os

import pytest
import torch
from kernel_calls import DTYPES, check_no_tokens
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

import delora_kernels as dk
from delora_kernels import explain, ops, use_backend
from delora_kernels import functional as F
from delora_kernels.backends import eager
from delora_kernels.backends.triton import forms, tables
from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.backends.triton.rank_gemm import rank_gemm
from delora_kernels.backends.triton.support import LARGEST_RANK
from delora_kernels.backends.triton.times_small import times_small
from delora_kernels.backends.triton.token_sums import token_sums
from delora_kernels.testing import METHODS, OPS, failures
from delora_kernels.testing.errors import relative_error
from delora_kernels.testing.ops.problems import op_problems

SIZES = ((7, 19, 13, 3), (1, 8, 5, 1), (70, 150, 137, 20))
RANDOM_SIZES = 50


@pytest.fixture(params=[forms.UPDATE, forms.PREFILL, forms.OWN])
def form(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each form of the frozen GEMM with a rank-R term, in small tiles, so that there is more than
    one.
    """
    monkeypatch.setattr(forms, "DEFAULT", request.param)
    monkeypatch.setattr("delora_kernels.backends.triton.rank_gemm.DESCRIPTORS_FROM", (0, 0))
    for way in tables.GEMMS:
        monkeypatch.setitem(tables.GEMMS, way, tables.GemmTiles(16, 32, 16, 4, 1, programs=3))
    return str(request.param)


FORMED = ("expand", "input_backward")
"""Ops in which the forms differ."""

REFLECTING = [name for name, method in METHODS.items() if method.function.startswith("ether")]
"""Methods that have no rank-R term."""


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OPS)
def test_op(name: str, dtype: str, seed: int) -> None:
    narrow, wide = DTYPES[dtype]
    wanted = len(SIZES) if dtype in ("float32", "bfloat16+float32") else 1
    wanted = min(wanted, 2) if name.startswith(("reflect", "grouped")) else wanted  # files of their own have the rest
    for T, K, N, R in SIZES[:wanted]:
        for problem in op_problems(name, T, K, N, R, backend="triton", dtype=narrow, rank_dtype=wide, seed=seed):
            assert failures(problem) == []


@pytest.mark.parametrize("name", OPS)
def test_tiles_of_hopper(name: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """The tables of compute capability 9.0, on more columns than a tile of any has."""
    monkeypatch.setitem(forms._capabilities, torch.device("cpu"), (9, 0))
    for problem in op_problems(name, 5, 200, 150, 16, backend="triton", dtype=torch.bfloat16, seed=seed):
        assert failures(problem) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16+float32"])
@pytest.mark.parametrize("method", [name for name in METHODS if name not in REFLECTING and "grouped" not in name])
def test_method(method: str, dtype: str, form: str, seed: int) -> None:
    """y and every gradient by the autograd Function on this backend."""
    narrow, wide = DTYPES[dtype]
    with use_backend("triton"):
        problem = METHODS[method].problem(66, 70, 75, 18, dtype=narrow, adapter_dtype=wide, seed=seed)
        assert failures(problem) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16+float32"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_most_ranks(method: str, dtype: str, seed: int) -> None:
    """512, in one piece and in as many turns as each kernel takes."""
    narrow, wide = DTYPES[dtype]
    with use_backend("triton"):
        problem = METHODS[method].problem(3, 21, 18, LARGEST_RANK, dtype=narrow, adapter_dtype=wide, seed=seed)
        assert failures(problem) == []


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16+float32"])
@pytest.mark.parametrize("method", REFLECTING)
def test_reflecting_method(method: str, dtype: str, seed: int) -> None:
    narrow, wide = DTYPES[dtype]
    with use_backend("triton"):
        problem = METHODS[method].problem(34, 24, 36, 4, dtype=narrow, adapter_dtype=wide, seed=seed)
        assert failures(problem) == []


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FORMED)
def test_forms(name: str, dtype: str, form: str, seed: int) -> None:
    narrow, wide = DTYPES[dtype]
    for problem in op_problems(name, 37, 40, 72, 18, backend="triton", dtype=narrow, rank_dtype=wide, seed=seed):
        assert failures(problem) == []


@pytest.mark.parametrize("name", FORMED)
def test_random_sizes_of_every_form(name: str, form: str, seed: int) -> None:
    _check_random_sizes(name, seed, RANDOM_SIZES)


@pytest.mark.parametrize("name", ["fold", "fold_backward"])
def test_random_sizes_of_folds(name: str, seed: int) -> None:
    """Against derived limits: a cast rounds, and a gradient that is zero but for rounding has no
    relative error.
    """
    for T, K, N, R in torch.randint(1, 90, (10, 4), generator=torch.Generator().manual_seed(seed)).tolist():
        for problem in op_problems(name, T, K + 1, N + 1, min(R, 40), backend="triton", seed=seed):
            assert failures(problem) == []


@pytest.mark.parametrize("name", ["project", "expand_backward", "row_norm", "project_route", "expand_route_backward"])
def test_random_sizes(name: str, seed: int) -> None:
    _check_random_sizes(name, seed)


def _check_random_sizes(name: str, seed: int, count: int = RANDOM_SIZES) -> None:
    """Odd shapes in float32, to 1e-5 of the largest element, or where terms cancel to the derived
    limit.
    """
    sizes = torch.randint(1, 90, (count, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    for T, K, N, R in sizes:
        variants = list(op_problems(name, T, K, N, min(R, 40), backend="triton", seed=seed))
        problem = variants[(T + K) % len(variants)]
        expected = problem.oracle({k: v.double() if _is_float(v) else v for k, v in problem.inputs.items()})
        for what, got in problem.run(problem.inputs).items():
            error = relative_error(got, expected[what])
            assert error <= 1e-5 or not failures(problem), (what, (T, K, N, R), error)


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@pytest.mark.parametrize("shape", [(0, 5), (1, 4), (5, 1), (33, 130)])
def test_masks_have_the_bits_of_the_eager_backend(shape: tuple[int, int], seed: int) -> None:
    one = torch.tensor(seed)
    for p in (0.1, 0.5, 0.93):
        assert torch.equal(ops.dropout_mask(*shape, p, one, "triton"), eager.dropout_mask(*shape, p, one))


def test_splits_strides_and_many_ranks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums split among programs, rows apart in memory, more ranks than one turn takes; the same
    bits every time.
    """
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(40, 700, generator=generator)[:, 100:430]
    small, h = torch.randn(330, 150, generator=generator), torch.randn(150, 40, generator=generator).t()

    def sums() -> list[Tensor]:
        parts = token_sums(x, h, 0.5, sums=True, y=x)
        return [add_parts(part, torch.float32) for part in (parts.product, parts.sums, parts.dots) if part is not None]

    for target in (1, 1000):
        monkeypatch.setattr(tables, "SPLIT_TARGET", target)
        torch.testing.assert_close(times_small(x, small, torch.float32), x @ small, rtol=1e-4, atol=1e-3)
        for got, expected in zip(sums(), (0.5 * x.t() @ h, x.sum(0), x.square().sum(0)), strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-3)
        assert all(torch.equal(a, b) for a, b in zip(sums(), sums(), strict=True))


def test_own_gemm_with_and_without_descriptors(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both layouts of W, strides that tile loads take and that they don't, what is kept, more ranks
    than one turn.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    for oldest, way in (((0, 0), "descriptors"), ((9, 0), "pointers")):
        monkeypatch.setattr("delora_kernels.backends.triton.rank_gemm.DESCRIPTORS_FROM", oldest)
        monkeypatch.setitem(tables.GEMMS, way, tables.GemmTiles(16, 32, 16, 4, 1, programs=5))
        for D in (40, 37):
            x, h, small, c, bias = normal(50, D + 4)[:, :D], normal(50, 70), normal(70, 61), normal(61), normal(61)
            for w in (normal(61, D).t(), normal(D, 61), normal(D, 64)[:, :61]):
                out, kept = rank_gemm(x, w, h, small, 0.3, column=c, bias=bias, keep=True)
                torch.testing.assert_close(kept, x @ w, rtol=1e-4, atol=1e-4)
                torch.testing.assert_close(out, c * (x @ w + 0.3 * h @ small) + bias, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_show_where_they_do_in_the_eager_backend(value: float, seed: int) -> None:
    """Also where the element that has them is dropped: torch's dropout multiplies by 0."""
    arguments = METHODS["dora-dropout"].draw(9, 12, 10, 3, seed=seed)
    arguments["x"][4, 5] = value
    results = []
    for backend in ("eager", "triton"):
        with use_backend(backend):
            results.append(METHODS["dora-dropout"].fused(arguments))
    for name, eager_result in results[0].items():
        assert torch.equal(results[1][name].isfinite(), eager_result.isfinite()), name


def test_no_tokens() -> None:
    check_no_tokens("triton")


def test_what_it_does_not_take() -> None:
    """A reason for each call that it can't take: shown by explain, raised on request."""
    big = {"x": torch.zeros(2, 6), "weight": torch.zeros(5, 6), "A": torch.zeros(600, 6), "B": torch.zeros(5, 600)}
    double = {name: value[:2].double() if name == "A" else value.double() for name, value in big.items()}
    double["B"] = double["B"][:, :2]
    for arguments, reason in ((big, "rank 600 is above 512"), (double, "float64 has no fast units")):
        assert explain(dk.functional.lora_linear, **arguments).reasons["triton"] == reason
        with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
            F.lora_linear(**arguments)
    fits = big | {"A": big["A"][:2], "B": big["B"][:, :2]}
    assert explain("lora_linear", **fits).backend == "eager"
