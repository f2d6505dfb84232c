"""One read of dy for dv, dyᵀ h and the vectors: every pair of dtypes, several chunks of columns and
of tokens.
"""

import pytest
import torch
from host_backend import SANITIZED, shuffle_threads
from torch import Tensor

from delora_kernels.backends.cuda import dy_sums, kernels, launch, stages
from delora_kernels.backends.library_gemm import DyParts
from delora_kernels.op_arguments import Rescaled, TermGradients

WIDE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(WIDE, WIDE), *((x, small) for x in (HALF, BF16) for small in (x, WIDE))]
"""Of dy, and of the small operand and h."""
SHAPES = 4 if SANITIZED else 50


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


def _off(got: Tensor | None, expected: Tensor) -> float:
    assert got is not None
    return float((got.double() - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize("dtypes", DTYPES, ids=_names)
def test_odd_shapes(dtypes: tuple[torch.dtype, ...], seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """To 1e-5 of the largest element in float64: sums are in float32 and a float32 factor keeps its
    bits.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffle_threads(seed)
    for case in range(SHAPES):
        T, N, R = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 600, 33))
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[case % 3])
        dy = torch.randn(T, N + case % 5, generator=generator).to(dtypes[0])[:, case % 5 :]
        small = torch.randn((N, R) if case % 2 else (R, N), generator=generator).to(dtypes[1])
        small = small if case % 2 else small.t()
        h = torch.randn(T, R + 3, generator=generator).to(dtypes[1])[:, 2 : 2 + R]
        y = torch.randn(T, N + case % 7, generator=generator).to(dtypes[0])[:, case % 7 :]
        c = torch.randn(N, generator=generator) if case % 4 else None
        sums, dots = case % 2 == 0, case % 3 < 2
        found = dy_sums.dy_sums(dy, small, h, 0.75, sums, y if dots else None, c)
        wide = dy.double()
        dv, product, *_ = stages.STAGES.finished(found._replace(dots=None), torch.float32)
        case_of = (T, N, R, case)
        assert _off(dv, wide @ (small.double() if c is None else small.double() * c.double()[:, None])) <= 1e-5, case_of
        assert _off(product, 0.75 * wide.t() @ h.double()) <= 1e-5, case_of
        assert (found.sums is not None) == sums
        assert (found.dots is not None) == dots
        if found.sums is not None:
            assert _off(found.sums.sum(0), wide.sum(0)) <= 1e-5, case_of
        if found.dots is not None:
            assert _off(found.dots.sum(0), (wide * y.double()).sum(0)) <= 1e-5, case_of


@pytest.mark.parametrize("dtype", [WIDE, HALF, BF16])
def test_the_same_bits_in_any_order_of_threads(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    dy, y = torch.randn(2, 150, 300, generator=generator).to(dtype)
    small, h = torch.randn(300, 20, generator=generator).to(dtype), torch.randn(150, 20, generator=generator).to(dtype)
    c = torch.randn(300, generator=generator)
    results = []
    for order in range(3):
        shuffle_threads(seed + order)
        results.append(dy_sums.dy_sums(dy, small, h, 1.0, True, y, c))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True) if a is not None and b is not None)


@pytest.mark.parametrize(("R", "reads"), [(1, 1), (32, 1), (33, 2)])
def test_reads_of_dy(R: int, reads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One up to rank 32, and a launch that adds the parts; above, one for dv and one for the
    sums.
    """
    launched = []

    def noted(name: str, *arguments: Tensor | float | bool | None) -> None:
        launched.append(name)
        launch.launch(name, *arguments)

    for module in (dy_sums, kernels):
        monkeypatch.setattr(module, "launch", noted)
    dy, h, B_hat = torch.randn(70, 90), torch.randn(70, R), torch.randn(90, R)
    rescaled = Rescaled(torch.ones(90), dy, True, torch.ones(90))
    stages.expand_backward(dy, TermGradients(h, B_hat, 2.0), rescaled, True)
    readers = [name for name in launched if name in ("dy_sums", "times_small", "token_sums")]
    assert readers == (["dy_sums"] if reads == 1 else ["times_small", "token_sums"])
    assert launched[-1] == "finish_dy"
    assert reads == 2 or len(launched) == 2


def test_what_it_does_not_take() -> None:
    """More ranks, operands of two dtypes, nothing to read: two kernels do it, or the launcher
    refuses.
    """
    dy, small, h = torch.zeros(4, 6, dtype=BF16), torch.zeros(6, 2, dtype=BF16), torch.zeros(4, 2, dtype=BF16)
    assert dy_sums.takes(dy, small, h)
    assert not dy_sums.takes(dy, small, h.float())
    assert not dy_sums.takes(dy[:0], small, h[:0])
    assert not dy_sums.takes(dy, torch.zeros(6, 33, dtype=BF16), torch.zeros(4, 33, dtype=BF16))
    with pytest.raises(RuntimeError, match=r"dy_sums\(bfloat16\[4, 6\] strides \[6, 1\].*a dtype that"):
        dy_sums.dy_sums(dy, small, h.float(), 1.0, False, None)
    with pytest.raises(RuntimeError, match=r"dy_sums\(.*a size out of range"):
        dy_sums.dy_sums(dy, torch.zeros(6, 33), torch.zeros(4, 33), 1.0, False, None)


def test_nan_and_inf_stay_in_their_rows_and_columns() -> None:
    dy, small, h = torch.ones(70, 300), torch.ones(300, 3), torch.ones(70, 3)
    dy[66, 290], dy[3, 5] = torch.nan, torch.inf
    parts: DyParts = dy_sums.dy_sums(dy, small, h, 1.0, True, None)
    dv, product, sums, _ = stages.STAGES.finished(parts, torch.float32)
    assert dv is not None
    assert product is not None
    assert sums is not None
    rows, columns = torch.zeros(70, dtype=torch.bool), torch.zeros(300, dtype=torch.bool)
    rows[[66, 3]], columns[[290, 5]] = True, True
    assert torch.equal(~dv.isfinite(), rows[:, None].expand(-1, 3))
    assert torch.equal(~product.isfinite(), columns[:, None].expand(-1, 3))
    assert torch.equal(~sums.isfinite(), columns)
