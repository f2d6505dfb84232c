"""What one read of a token-sized matrix gives, all of it at once: sums, with a mask, and the rank-R
term on the way.
"""

import pytest
import torch
from host_backend import SANITIZED, shuffle_threads
from torch import Tensor

from delora_kernels.backends.cuda import kernels, launch, stages
from delora_kernels.backends.dropout import MaskGroup, mask_groups
from delora_kernels.backends.library_gemm import WrittenTerm
from delora_kernels.op_arguments import Branch, Frozen, Masks
from delora_kernels.testing.errors import relative_error

WIDE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(WIDE, WIDE), (HALF, HALF), (HALF, WIDE), (BF16, BF16), (BF16, WIDE)]
"""Of x and of what is small."""
SHAPES = 4 if SANITIZED else 30


@pytest.mark.parametrize("dtype", [WIDE, HALF, BF16])
@pytest.mark.parametrize("sums", [False, True])
@pytest.mark.parametrize("columns", [64, 70])
def test_vectors_beside_a_masked_product(columns: int, sums: bool, dtype: torch.dtype, seed: int) -> None:
    """With 70 columns only some threads of the last tile have one, and rows start off 16 bytes."""
    shuffle_threads(seed)
    generator = torch.Generator().manual_seed(seed)
    x, y = torch.randn(2, 200, columns, generator=generator).to(dtype)
    h = torch.randn(200, 5, generator=generator).to(dtype)
    (group,) = mask_groups(5, Masks([5], [0.5], torch.tensor([seed])))
    found = kernels.token_sums(x, h, sums=sums, y=y, group=group)
    assert found.product is not None
    assert found.dots is not None
    kept = kernels.dropout_mask(200, columns, 0.5, group.seed)
    expected = {"product": (2 * x * kept).double().t() @ h.double(), "dots": (x.double() * y.double()).sum(0)}
    results = {"product": found.product.sum(0), "dots": found.dots.sum(0)}
    if sums:
        assert found.sums is not None
        expected["sums"], results["sums"] = x.double().sum(0), found.sums.sum(0)
    for name, result in results.items():
        assert (result - expected[name]).abs().max() <= 1e-5 * expected[name].abs().max(), name


@pytest.mark.parametrize(
    "dtypes", DTYPES, ids=lambda pair: "+".join(str(dtype).removeprefix("torch.") for dtype in pair)
)
def test_the_term_on_the_way(
    dtypes: tuple[torch.dtype, torch.dtype], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """out = factor · drop(h small), rounded once, beside the product of h's first columns; every
    third one masked.
    """
    generator = torch.Generator().manual_seed(seed)
    shuffle_threads(seed)
    for case in range(SHAPES):
        T, C, R = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 200, 65))
        C = C // 8 * 8 + 8 if case % 2 else C
        monkeypatch.setattr(launch, "SPLIT_TARGET", (1, 4, 528)[case % 3])
        x, h = (
            torch.randn(T, C, generator=generator).to(dtypes[0]),
            torch.randn(T, R, generator=generator).to(dtypes[1]),
        )
        small = torch.randn(C, R, generator=generator).to(dtypes[1]).t()
        small = small if case % 4 < 2 else small.contiguous()
        p, ranks = (0.4, R) if case % 3 == 2 else (0.0, max(1, R - case % 5))
        mask = MaskGroup(slice(0, R), p, torch.tensor(seed + case) if p else None)
        out = torch.full((T, C), torch.nan, dtype=dtypes[0])
        found = kernels.token_sums(
            x, h, 1.75, group=mask, transposed=case % 2 == 0, ranks=ranks, term=WrittenTerm(small, out)
        )
        kept = kernels.dropout_mask(T, C, p, mask.seed).double() if mask.seed is not None else 1.0
        case_of, factor, wide, small = (T, C, R, case), 1.75 / (1 - p), h.double(), small.double()
        assert found.product is not None
        product = found.product.sum(0).double()
        expected = factor * (x.double() * kept).t() @ wide[:, :ranks]
        error = ((product.t() if case % 2 == 0 else product) - expected).abs().max()
        assert error <= 1e-5 * expected.abs().max(), case_of
        # a rounding to out's dtype, those of float32 sums, and of float32 factors beside bfloat16
        # those of two planes, beside float16 those of two tf32 numbers
        terms = (R + 3) * 2**-24 + {(BF16, WIDE): 2**-15, (HALF, WIDE): 3 * 2**-22}.get(dtypes, 0.0)
        exact, size, of = factor * wide @ small, factor * wide.abs() @ small.abs(), torch.finfo(dtypes[0])
        limit = of.eps / 2 * (exact.abs() + of.smallest_normal) + terms * size
        assert ((out.double() - kept * exact).abs() <= kept * limit).all(), case_of


@pytest.mark.parametrize("dtype", [WIDE, HALF, BF16])
def test_the_same_bits_in_any_order_of_threads(dtype: torch.dtype, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x, h, small = (torch.randn(shape, generator=generator) for shape in ((200, 200), (200, 40), (40, 200)))
    results = []
    for order in range(3):
        shuffle_threads(seed + order)
        out = torch.empty(200, 200, dtype=dtype)
        found = kernels.token_sums(
            x.to(dtype), h, group=MaskGroup(slice(0, 40), 0.5, torch.tensor(seed)), term=WrittenTerm(small, out)
        )
        results.append((found.product, out))
    for product, out in results[1:]:
        assert torch.equal(product, results[0][0])
        assert torch.equal(out, results[0][1])


@pytest.mark.parametrize(
    ("ranks", "r", "launches"),
    [
        ([64], 64, ["token_sums"]),
        ([64], 10, ["token_sums"]),
        ([65], 65, ["token_sums", "rank_update"]),
        ([12, 8], 20, ["token_sums", "token_sums", "rank_update", "rank_update"]),
        ([12, 8], 10, ["token_sums", "rank_update", "rank_update"]),
    ],
)
def test_who_writes_the_term(
    ranks: list[int], r: int, launches: list[str], seed: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """token_sums, where one block holds all ranks of the one mask; else rank_update, for each
    mask.
    """
    launched = []

    def noted(name: str, *arguments: Tensor | float | bool | None) -> None:
        launched.append(name)
        launch.launch(name, *arguments)

    monkeypatch.setattr(kernels, "launch", noted)
    monkeypatch.setattr(launch, "SPLIT_TARGET", 1)
    generator, R = torch.Generator().manual_seed(seed), sum(ranks)
    dy, weight, dv, A_hat, x = (
        torch.randn(shape, generator=generator) for shape in ((70, 40), (40, 90), (70, R), (R, 90), (70, 90))
    )
    masks = Masks(ranks, [0.0] * len(ranks), torch.arange(len(ranks)))
    dx, dA_hat = stages.input_backward(dy, Frozen(weight), Branch(dv, A_hat, x, r, 2.0), masks)
    assert launched == launches
    assert relative_error(dA_hat, 2 * dv[:, :r].double().t() @ x.double()) <= 1e-5
    assert relative_error(dx, dy.double() @ weight.double() + 2 * dv.double() @ A_hat.double()) <= 1e-5


def test_what_it_does_not_take() -> None:
    x, h, small = torch.zeros(4, 6), torch.zeros(4, 65), torch.zeros(65, 6)
    none = MaskGroup(slice(0, 65), 0.0, None)
    assert not kernels.takes_term(x, h, small, none)
    assert not kernels.takes_term(x, h[:, :3], small[:3].half(), none)
    assert kernels.takes_term(x, h[:, :64], small[:64], none)
    with pytest.raises(RuntimeError, match=r"token_sums\(.*a size out of range"):
        kernels.token_sums(x, h, term=WrittenTerm(small, torch.empty(4, 6)))
    with pytest.raises(RuntimeError, match=r"token_sums\(.*a dtype that"):
        kernels.token_sums(x, h[:, :3], term=WrittenTerm(small[:3].half(), torch.empty(4, 6)))
