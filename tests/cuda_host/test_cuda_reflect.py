"""The reflections' CUDA kernels on the CPU: blocks of any size and number, every dtype, split sums,
the same bits.
"""

import pytest
import torch
from host_backend import SANITIZED, shuffle_threads
from torch import Tensor

from delora_kernels.backends.cuda import launch, reflect, reflect_backward
from delora_kernels.testing.ops import formulas

SIZES = [(70, 1, 1100), (70, 3, 400), (33, 130, 2), (129, 9, 24), (1, 1, 1)]
"""Tokens, blocks, features of each: more than a step's columns or a warp's, more blocks than a step
takes.
"""
RANDOM_SIZES = 4 if SANITIZED else 50


def _problem(T: int, n: int, D: int, dtype: torch.dtype, vectors: torch.dtype, seed: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    made = {name: torch.randn(T, n * D + 8, generator=generator)[:, : n * D].to(dtype) for name in ("x", "dy")}
    made |= {name: torch.randn(n, D, generator=generator).to(vectors) for name in ("u", "v")}
    made["bias"] = torch.randn(n * D, generator=generator).to(dtype)
    return made


def _check(made: dict[str, Tensor], with_v: bool, with_bias: bool, limit: float) -> None:
    """y and dx to `limit`, du and dv to 1e-5 of the largest of what is added up: one number may
    cancel.
    """
    wide = {name: value.double() for name, value in made.items()}
    v, wide_v = (made["v"], wide["v"]) if with_v else (None, None)
    bias, wide_bias = (made["bias"], wide["bias"]) if with_bias else (None, None)
    y = reflect(made["x"], made["u"], v, bias)
    expected = formulas.reflect(wide["x"], wide["u"], wide_v, wide_bias)
    terms = wide["x"].abs().max() + (0.0 if wide_bias is None else wide_bias.abs().max())
    assert (y.double() - expected).abs().max() <= limit * max(expected.abs().max(), terms)
    assert y.dtype == made["x"].dtype
    got = reflect_backward(made["dy"], made["x"], made["u"], v, True)
    want = formulas.reflect_backward(wide["dy"], wide["x"], wide["u"], wide_v, True)
    assert want[0] is not None
    assert (got[0].double() - want[0]).abs().max() <= limit * max(want[0].abs().max(), wide["dy"].abs().max())
    shortest = min(wide[name].norm(dim=1).masked_fill(wide[name].norm(dim=1) == 0, 1e9).min() for name in ("u", "v"))
    summed = (wide["x"].norm(dim=1) * wide["dy"].norm(dim=1)).sum() / shortest
    for result, exact in zip(got[1:], want[1:], strict=True):
        if exact is not None:
            assert (result.double() - exact).abs().max() <= 1e-5 * max(exact.abs().max(), summed)
    no_dx = reflect_backward(made["dy"], made["x"], made["u"], v, False)
    assert no_dx[0].numel() == 0
    assert torch.equal(no_dx[1], got[1])


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("dtypes", ["float32+float32", "float16+float16", "bfloat16+float32", "float32+bfloat16"])
def test_blocks(size: tuple[int, int, int], dtypes: str, seed: int) -> None:
    """16-bit results are rounded once: half a unit in the last place."""
    shuffle_threads(seed)
    dtype, vectors = (getattr(torch, name) for name in dtypes.split("+"))
    made = _problem(*size, dtype, vectors, seed)
    for with_v in (False, True):
        _check(made, with_v, with_v, max(1e-5, torch.finfo(dtype).eps))


@pytest.mark.parametrize(
    "dtypes", ["float32+float32", "float16+float16", "bfloat16+bfloat16", "float16+float32", "bfloat16+float32"]
)
def test_random_sizes(dtypes: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    dtype, vectors = (getattr(torch, name) for name in dtypes.split("+"))
    generator = torch.Generator().manual_seed(seed)
    for case in range(RANDOM_SIZES):
        T, n, D = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 9, 90))
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[case % 3])
        made = _problem(T, n, D, dtype, vectors, seed + case)
        if case % 5 == 0:
            made["u"][-1] = 0
        _check(made, case % 2 == 0, case % 3 == 0, max(1e-5, torch.finfo(dtype).eps))


def test_the_same_bits_in_any_order_of_threads(seed: int) -> None:
    made = _problem(170, 3, 70, torch.bfloat16, torch.float32, seed)
    results = []
    for order in range(3):
        shuffle_threads(seed + order)
        results.append(reflect_backward(made["dy"], made["x"], made["u"], made["v"], True))
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_no_tokens() -> None:
    empty, u = torch.zeros(0, 6), torch.ones(2, 3)
    assert reflect(empty, u, None, None).shape == (0, 6)
    dx, du, dv = reflect_backward(empty, empty, u, u, True)
    assert dx.shape == (0, 6)
    assert not du.any()
    assert not dv.any()
