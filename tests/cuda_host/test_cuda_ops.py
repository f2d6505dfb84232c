"""The CUDA kernels on the CPU, through the host shim: every op and method against its formula,
forward and backward.

Run by `make test-cuda-host`, which compiles them first. The order in which threads run is drawn
anew in each test.
"""

import pytest
import torch
from host_backend import SANITIZED, shuffle_threads
from kernel_calls import DTYPES, check_no_tokens
from torch import Tensor

from delora_kernels import ops, use_backend
from delora_kernels.backends import eager
from delora_kernels.backends.cuda import kernels, launch
from delora_kernels.backends.cuda.stages import STAGES
from delora_kernels.testing import METHODS, OPS, failures
from delora_kernels.testing.ops.problems import op_problems

SIZES = ((7, 19, 13, 3), (1, 8, 5, 1), (70, 150, 137, 20), (130, 72, 200, 70))
RANDOM_SIZES = 50
if SANITIZED:  # for addresses, not for numbers
    DTYPES = {dtype: DTYPES[dtype] for dtype in ("float32", "bfloat16+float32")}
    SIZES, RANDOM_SIZES = SIZES[:3], 4
OURS = [name for name in OPS if not name.endswith("weight_grad")]
"""Ops with kernels of their own."""


@pytest.fixture(autouse=True)
def _threads_in_any_order(seed: int) -> None:
    shuffle_threads(seed)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", OURS)
def test_op(name: str, dtype: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    narrow, wide = DTYPES[dtype]
    for T, K, N, R in SIZES if dtype in ("float32", "bfloat16+float32") else SIZES[::2]:
        monkeypatch.setattr(launch, "SPLIT_TARGET", 1 if T > 100 else 528)  # sums in one piece, and split
        for problem in op_problems(name, T, K, N, R, backend="cuda", dtype=narrow, rank_dtype=wide, seed=seed):
            assert failures(problem) == []


@pytest.mark.skipif(SANITIZED, reason="the ops are enough for addresses")
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16+float32"])
@pytest.mark.parametrize("method", METHODS)
def test_method(method: str, dtype: str, seed: int) -> None:
    """y and every gradient by the autograd Function on this backend."""
    narrow, wide = DTYPES[dtype]
    with use_backend("cuda"):
        problem = METHODS[method].problem(66, 70, 75, 18, dtype=narrow, adapter_dtype=wide, seed=seed)
        assert failures(problem) == []


@pytest.mark.parametrize("name", [name for name in OURS if "fold" not in name])
def test_random_sizes(name: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd shapes in float32, to 1e-5 of the largest element, or where terms cancel to the derived
    limit.
    """
    sizes = torch.randint(1, 90, (RANDOM_SIZES, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    for T, drawn, N, R in sizes:
        K = _side(name, drawn)
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[N % 3])
        variants = list(op_problems(name, T, K, N, min(R, 40), backend="cuda", seed=seed))
        problem = variants[(T + K) % len(variants)]
        expected = problem.oracle({k: v.double() if _is_float(v) else v for k, v in problem.inputs.items()})
        for what, got in problem.run(problem.inputs).items():
            error = (got.double() - expected[what]).abs().max() / expected[what].abs().max().clamp(min=1e-30)
            assert error <= 1e-5 or not failures(problem), (what, (T, K, N, R), error)


def _side(name: str, drawn: int) -> int:
    """The gradient of a direction of one number is 0 but for rounding: no limit can be derived for
    it.
    """
    return max(drawn, 2) if "reflect" in name or "fold" in name else drawn


@pytest.mark.parametrize("dtype", [dtype for dtype in DTYPES if dtype not in ("float32", "bfloat16")])
@pytest.mark.parametrize("name", [name for name in OURS if name != "reflect_backward"])
def test_random_sizes_in_16_bits(name: str, dtype: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Odd shapes against derived limits, and no worse than eager PyTorch.

    What is left of a sum across a direction of two numbers may cancel: test_cuda_reflect.py has
    limits for that.
    """
    narrow, wide = DTYPES[dtype]
    sizes = torch.randint(1, 90, (RANDOM_SIZES // 2, 4), generator=torch.Generator().manual_seed(seed)).tolist()
    for T, *drawn, R in sizes:
        K, N = (_side(name, side) for side in drawn)
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[N % 3])
        problems = op_problems(
            name, T, K, N, min(R, 40), backend="cuda", dtype=narrow, rank_dtype=wide, seed=seed
        )  # fmt: skip
        variants = list(problems)
        bad = failures(variants[(T + K) % len(variants)])
        assert bad == [], (T, K, N, R)


@pytest.mark.parametrize("name", ["fold", "fold_backward"])
def test_random_sizes_of_folds(name: str, seed: int) -> None:
    """Against derived limits: a cast rounds, and a gradient that is zero but for rounding has no
    relative error.
    """
    sizes = torch.randint(1, 90, (RANDOM_SIZES, 3), generator=torch.Generator().manual_seed(seed)).tolist()
    for K, N, R in sizes:
        variants = list(op_problems(name, 1, K + 1, N + 1, min(R, 40), backend="cuda", seed=seed))
        assert failures(variants[(K + N) % len(variants)]) == []


def _is_float(value: object) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def test_masks_have_the_bits_of_the_eager_backend(seed: int) -> None:
    one = torch.tensor(seed)
    shapes = torch.randint(1, 150, (RANDOM_SIZES, 2), generator=torch.Generator().manual_seed(seed)).tolist()
    for T, K in [(0, 5), (1, 4), (5, 1), *shapes]:
        for p in (0.1, 0.5, 0.93):
            assert torch.equal(ops.dropout_mask(T, K, p, one, "cuda"), eager.dropout_mask(T, K, p, one)), (T, K, p)


def test_splits_strides_and_many_ranks(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sums split among blocks, rows apart in memory, rows that 16 bytes do not divide, more ranks
    than a tile has; and
    the same bits every time, in whatever order threads run."""
    generator = torch.Generator().manual_seed(seed)
    wide = torch.randn(140, 700, generator=generator)
    small, h = torch.randn(330, 150, generator=generator), torch.randn(150, 140, generator=generator).t()

    def everything(x: Tensor, dtype: torch.dtype) -> list[Tensor]:
        x, y = x.to(dtype), x.to(dtype) if x.is_contiguous() else x.flip(0).to(dtype)
        found = kernels.token_sums(x, h, 0.5, sums=True, y=y)
        assert found.product is not None
        _, product, sums, _ = STAGES.finished(found._replace(dots=None), dtype)
        assert product is not None
        assert sums is not None
        return [
            kernels.times_small(x, small, torch.float32),
            product,
            sums,
            kernels.add_parts(found.dots, torch.float32),
        ]

    views = (wide[:, 100:430], wide[:, 101:431], wide.flatten()[1 : 1 + 140 * 330].view(140, 330))
    for x, dtype in zip(views, (torch.float32, torch.float16, torch.bfloat16), strict=True):
        for target in (1, 1000):
            monkeypatch.setattr(launch, "SPLIT_TARGET", target)
            shuffle_threads(seed)
            first = everything(x, dtype)
            z = x.to(dtype).double()
            y = z if x.is_contiguous() else x.flip(0).to(dtype).double()
            exact = [z @ small.double(), 0.5 * z.t() @ h.double(), z.sum(0), (z * y).sum(0)]
            for got, expected in zip(first, exact, strict=True):
                assert (got.double() - expected).abs().max() <= 1e-5 * expected.abs().max()
            shuffle_threads(seed + 1)
            assert all(torch.equal(a, b) for a, b in zip(first, everything(x, dtype), strict=True))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_show_where_they_do_in_the_eager_backend(value: float, seed: int) -> None:
    """Also where the element that has them is dropped: torch's dropout multiplies by 0."""
    for method in ("dora-dropout", "lora-dropout"):
        arguments = METHODS[method].draw(9, 12, 10, 3, seed=seed)
        arguments["x"][4, 5] = value
        results = []
        for backend in ("eager", "cuda"):
            with use_backend(backend):
                results.append(METHODS[method].fused(arguments))
        for name, eager_result in results[0].items():
            assert torch.equal(results[1][name].isfinite(), eager_result.isfinite()), (method, name)


@pytest.mark.parametrize("K", [8, 200])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_an_infinite_factor_in_row_norm_shows_as_in_the_formula(K: int, dtype: torch.dtype, seed: int) -> None:
    """Also where a tile ends outside of W: infinite, not NaN; and a NaN stays in its row. For any
    strides.
    """
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (torch.randn(shape, generator=generator) for shape in ((21, K), (3, K), (21, 3)))
    W = W.to(dtype).float()  # beside float32 factors
    B[4, 1], B[17, 2], W[9, K - 1] = torch.inf, -torch.inf, torch.nan
    m = torch.ones(21)
    expected = (W + 0.5 * B @ A).norm(dim=1)
    for weight in (W, W.t().contiguous().t(), W.repeat_interleave(2, 1)[:, ::2]):
        assert torch.equal(weight.nan_to_num(), W.nan_to_num())
        norm, c, scaled = ops.row_norm(weight.to(dtype), A.t().contiguous().t(), B, 0.5, m, True, "cuda")
        torch.testing.assert_close(norm, expected, equal_nan=True)
        torch.testing.assert_close(c, m / expected, equal_nan=True)
        torch.testing.assert_close(scaled, (c[:, None] * W).to(dtype), equal_nan=True)


def test_no_tokens() -> None:
    check_no_tokens("cuda")


def test_a_status_becomes_an_error() -> None:
    """It names the kernel, its arguments and what is wrong."""
    x, small, out = torch.zeros(4, 6), torch.zeros(6, 2), torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match=r"times_small\(float32\[4, 6\] strides \[6, 1\], float16.*a dtype that"):
        kernels.times_small(x, small.half(), torch.float32)
    with pytest.raises(RuntimeError, match=r"scaled\(.*rows that are not contiguous \(status -2\)"):
        launch.launch("scaled", x.t(), x[:, 0].contiguous(), out, 6, 4, True)
    with pytest.raises(ValueError, match=r"contiguous memory here, got float32\[4\] strides \[6\]"):
        launch.launch("scaled", x, x[:, 0], x.clone(), 4, 6, True)
