"""Triton's reflections in its interpreter: any block size, chunked and whole, split sums, their
traffic.
"""

import importlib
import os

import pytest
import torch
from torch import Tensor

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from traffic import Traffic

from delora_kernels import functional as F
from delora_kernels import ops, use_backend
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.add_parts import add_parts
from delora_kernels.testing.ops import formulas

MODULE = importlib.import_module("delora_kernels.backends.triton.reflect")


@pytest.fixture(params=["whole", "chunked"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Blocks held at once, or walked in chunks of 16 features."""
    if request.param == "chunked":
        monkeypatch.setattr(MODULE, "LARGEST", 0)
        for tile in ("CHUNK", "SUMS"):
            monkeypatch.setattr(MODULE, tile, tables.Tiles(16, 16, 4, 3))
    return str(request.param)


def problem(generator: torch.Generator) -> dict[str, Tensor]:
    """Random sizes; any number of blocks, of any size."""
    T, n, D = (int(torch.randint(1, most, (), generator=generator)) for most in (40, 5, 50))
    made = {name: torch.randn(T, n * D, generator=generator) for name in ("x", "dy")}
    made |= {name: torch.randn(n, D, generator=generator) for name in ("u", "v")}
    return made | {"bias": torch.randn(n * D, generator=generator)}


def assert_close(got: Tensor, expected: Tensor | None, scale: Tensor) -> None:
    """To 1e-5 of the largest element of what is added up: gradients of tiny blocks vanish by
    cancellation.
    """
    assert expected is not None
    assert (got.double() - expected).abs().max() <= 1e-5 * max(expected.abs().max(), scale)


def test_random_sizes(way: str, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(seed)
    for case in range(10):
        monkeypatch.setattr(tables, "SPLIT_TARGET", (1, 30)[case % 2])
        made = problem(generator)
        if case % 5 == 0:
            made["u"][-1] = 0
        x, dy, u, bias = (made[name] for name in ("x", "dy", "u", "bias"))
        v = made["v"] if case % 3 else None
        wide = {name: value.double() for name, value in made.items()} | {"v": None if v is None else v.double()}
        y = ops.reflect(x, u, v, bias if case % 2 else None, "triton")
        assert_close(y, formulas.reflect(wide["x"], wide["u"], wide["v"], wide["bias"] if case % 2 else None), x.max())
        got = ops.reflect_backward(dy, x, u, v, True, "triton")
        want = formulas.reflect_backward(wide["dy"], wide["x"], wide["u"], wide["v"], True)
        summed = (x.norm(dim=1) * dy.norm(dim=1)).sum() / u.norm(dim=1).clamp(min=0.1).min()
        assert_close(got[0], want[0], dy.max())
        assert_close(got[1], want[1], 0.1 * summed)
        if v is not None:
            assert_close(got[2], want[2], 0.1 * summed / v.norm(dim=1).clamp(max=1).min())
        if case < 4:
            again = ops.reflect_backward(dy, x, u, v, True, "triton")
            assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))


@pytest.mark.parametrize("count", [8, 9, 64, 65, 200])
def test_many_parts(count: int, seed: int) -> None:
    """Of few elements, as the sums of a block come in: each part once, in an order that stays."""
    parts = torch.randn(count, 3, 50, generator=torch.Generator().manual_seed(seed))
    got, want = add_parts(parts, torch.float32), parts.double().sum(0)
    assert (got - want).abs().max() <= count**0.5 * 2**-23 * parts.double().abs().sum(0).max()
    assert torch.equal(got, add_parts(parts, torch.float32))


Passes = tuple[dict[str, float], dict[str, float]]
T, K, N = 96, 56, 72
SIZES = {"x": T * K, "y": T * N, "W": N * K}


@pytest.mark.parametrize(
    ("side", "forward", "backward", "launches"),
    [
        # x read, x' written; x and what leaves the GEMM read, dx written
        ("input", ({"x": 1}, {"x": 1}), ({"x": 2}, {"x": 1}), (2, 4)),
        # z read, y written; dy and z read, dz written
        ("output", ({"y": 1}, {"y": 1}), ({"y": 2}, {"y": 1}), (2, 4)),
    ],
)
def test_passes_and_launches(
    way: str, side: str, forward: Passes, backward: Passes, launches: tuple[int, int], seed: int
) -> None:
    if way == "chunked":  # a and b first, then the sums, which read both again
        backward, launches = ({side: 2 * passes for side, passes in backward[0].items()}, backward[1]), (2, 6)
    generator = torch.Generator().manual_seed(seed)
    x, W = (torch.randn(*shape, generator=generator).bfloat16() for shape in ((T, K), (N, K)))
    C, suffix = (K, "") if side == "input" else (N, "_out")
    vectors = {name + suffix: torch.randn(4, C // 4, generator=generator).requires_grad_() for name in ("u", "v")}
    with use_backend("triton"):
        with Traffic(SIZES) as counted:
            y = F.ether_plus_linear(x.requires_grad_(), W, **vectors)
        assert _extra(counted, {"x": 1, "W": 1}, {"y": 1}) == forward
        assert counted.launches == launches[0]
        with Traffic(SIZES) as counted:
            y.backward(torch.ones(T, N).bfloat16())
    assert _extra(counted, {"y": 1, "W": 1}, {"x": 1}) == backward
    assert counted.launches <= launches[1]


def _extra(counted: Traffic, read: dict[str, int], written: dict[str, int]) -> Passes:
    """The passes beyond the frozen linear's."""
    pairs = ((counted.read, read), (counted.written, written))
    beyond = [{k: seen[k] - frozen.get(k, 0) for k in SIZES} for seen, frozen in pairs]
    reads, writes = ({k: passes for k, passes in each.items() if passes} for each in beyond)
    return reads, writes
