"""Where torch allows tf32, float32 operands are rounded to it once and multiplied exactly; where
not, they are not.
"""

from collections.abc import Callable, Iterator

import pytest
import torch
from gatings import note_launches
from host_backend import SANITIZED, shuffle_threads
from torch import Tensor

from delora_kernels.backends.cuda import dy_sums, kernels, launch, route
from delora_kernels.backends.cuda.row_norm import row_norm
from delora_kernels.backends.dropout import MaskGroup
from delora_kernels.backends.library_gemm import WrittenTerm
from delora_kernels.op_arguments import Gating, Masks

SHAPES = 4 if SANITIZED else 20
Found = dict[str, tuple[Tensor, Tensor]]
"""Name → a kernel's result and the same in float64, of operands that are rounded before each
product or not.
"""


@pytest.fixture(params=["highest", "high", "medium"])
def rounding(request: pytest.FixtureRequest) -> Iterator[Callable[[Tensor], Tensor]]:
    """What a float32 operand of a product becomes, in float64."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(request.param)
    yield Tensor.double if request.param == "highest" else to_tf32
    torch.set_float32_matmul_precision(before)


def to_tf32(x: Tensor) -> Tensor:
    """The nearest numbers of 11 significant bits, ties away from 0, in float64."""
    fraction, exponent = torch.frexp(x.double())
    scaled = fraction.abs() * 2**11
    return torch.ldexp(torch.copysign((scaled + 0.5).floor(), fraction), exponent - 11)


def times_small(T: int, C: int, R: int, draw: Callable[..., Tensor], rounded: Callable[[Tensor], Tensor]) -> Found:
    x, small = draw(T, C), draw(C, R)
    return {"h": (kernels.times_small(x, small, torch.float32), rounded(x) @ rounded(small))}


def token_sums(T: int, C: int, R: int, draw: Callable[..., Tensor], rounded: Callable[[Tensor], Tensor]) -> Found:
    """The vectors are no products: nothing is rounded for them."""
    x, y, h, small, out = draw(T, C), draw(T, C), draw(T, R), draw(R, C), draw(T, C)
    found = kernels.token_sums(x, h, 0.75, sums=True, y=y)
    kernels.token_sums(x, h, 0.75, group=MaskGroup(slice(0, R), 0.0, None), term=WrittenTerm(small, out))
    return {
        "product": (_total(found.product), 0.75 * rounded(x).t() @ rounded(h)),
        "sums": (_total(found.sums), x.double().sum(0)),
        "dots": (_total(found.dots), (x.double() * y.double()).sum(0)),
        "term": (out, 0.75 * rounded(h) @ rounded(small)),
    }


def sums_of_dy(T: int, C: int, R: int, draw: Callable[..., Tensor], rounded: Callable[[Tensor], Tensor]) -> Found:
    R = min(R, dy_sums.LARGEST_RANK)
    dy, small, h, c = draw(T, C), draw(C, R), draw(T, R), draw(C)
    found = {}
    for name, column in (("dv", None), ("dv with c", c)):
        parts = dy_sums.dy_sums(dy, small, h, 0.75, True, None, column)
        by = small if column is None else small * column[:, None]
        found |= {name: (_total(parts.dv), rounded(dy) @ rounded(by))}
        found |= {f"product beside {name}": (_total(parts.product), 0.75 * rounded(dy).t() @ rounded(h))}
        found |= {f"sums beside {name}": (_total(parts.sums), dy.double().sum(0))}
    return found


def rank_update(T: int, C: int, R: int, draw: Callable[..., Tensor], rounded: Callable[[Tensor], Tensor]) -> Found:
    base, h, small = draw(T, C), draw(T, R), draw(R, C)
    out = kernels.rank_update(base, h, small, 0.75, torch.empty(T, C))
    return {"out": (out, base.double() + 0.75 * rounded(h) @ rounded(small))}


def norm_of_rows(T: int, C: int, R: int, draw: Callable[..., Tensor], rounded: Callable[[Tensor], Tensor]) -> Found:
    """W itself is not multiplied."""
    W, A, B, m = draw(T, C), draw(R, C), draw(T, R), draw(T)
    norm, c, scaled = row_norm(W, A, B, 0.75, m, True)
    exact = (W.double() + 0.75 * rounded(B) @ rounded(A)).norm(dim=1)
    factor = m.double() / exact
    return {"norm": (norm, exact), "c": (c, factor), "scaled": (scaled, factor[:, None] * W.double())}


def _total(parts: Tensor | None) -> Tensor:
    assert parts is not None
    return parts.double().sum(0)


KERNELS = (times_small, token_sums, sums_of_dy, rank_update, norm_of_rows)


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.__name__)
def test_products(
    kernel: Callable[..., Found], rounding: Callable[[Tensor], Tensor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5 of the largest element; a product in the other way would be 2e-4 off."""
    generator = torch.Generator().manual_seed(seed)
    shuffle_threads(seed)
    for case in range(SHAPES):
        T, C, R = (
            int(torch.randint(least, most, (), generator=generator)) for least, most in ((8, 160), (8, 200), (1, 65))
        )
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[case % 3])
        found = kernel(T, C, R, lambda *shape: torch.randn(shape, generator=generator), rounding)
        for name, (result, exact) in found.items():
            assert (result.double() - exact).abs().max() <= 1e-5 * exact.abs().max(), (name, T, C, R)


def test_a_mixture_gated_on_the_way(
    rounding: Callable[[Tensor], Tensor], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The launch that projects and gates at once multiplies as the others do."""
    shuffle_threads(seed)
    generator, launched = torch.Generator().manual_seed(seed), note_launches(monkeypatch)
    monkeypatch.setattr(launch, "SPLIT_TARGET", 1)
    for E, r in ((4, 3), (4, 7), (4, 15)):
        x, A = torch.randn(70, 90, generator=generator), torch.randn(E * r + E, 90, generator=generator)
        gating = (None, 1, Gating(E, r, True, False, torch.ones(E)))
        h, *_ = route.project_route(x, A, Masks(), *gating)
        exact = rounding(x) @ rounding(A).t()
        assert (h.double() - exact).abs().max() <= 1e-5 * exact.abs().max(), (E, r)
    assert launched == ["project_route", "route_totals"] * 3


def test_infinity_beside_float16_is_that_of_the_formula(seed: int) -> None:
    """Infinite, not NaN, whichever operand it is in, and NaN where it meets 0 or comes from both
    signs.
    """
    shuffle_threads(seed)
    generator = torch.Generator().manual_seed(seed)
    x, small = torch.randn(70, 90, generator=generator).half(), torch.randn(90, 20, generator=generator)
    x[3, 5] = x[4, 6] = x[4, 7] = small[8, 2] = -torch.inf
    small[9, 3], small[10, 4], x[6, 8] = torch.inf, torch.nan, 0
    found, exact = kernels.times_small(x, small, torch.float32), x.double() @ small.double()
    assert torch.equal(found.isnan(), exact.isnan())
    assert torch.equal(found.isposinf(), exact.isposinf())
    assert torch.equal(found.isneginf(), exact.isneginf())
