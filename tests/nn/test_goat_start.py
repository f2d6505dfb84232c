"""A mixture's start: GOAT's own factors and residual weight, every set of triples, scales,
errors.
"""

import math
from typing import Any

import pytest
import torch
from goat_cases import GoatCase, goat_cases
from torch import Tensor

from delora_kernels.nn.goat_start import STARTS, moe_start


def products(A: Tensor, B: Tensor) -> Tensor:
    """Each rank's B_i A_i, whose sign is certain: [E, r, N, K]."""
    return torch.einsum("enr,erk->ernk", B.double(), A.double())


@pytest.mark.parametrize("case", goat_cases(), ids=str)
def test_golden(case: GoatCase) -> None:
    """The products of single ranks to 1e-3 (float32 noise where singular values are near), W_res to
    1e-5.
    """
    E, r, _ = case.A_init.shape
    found = moe_start(case.weight0.float(), E, r, scaling=case.scaling[0])  # the source starts all on the first scale
    want = products(case.A_init, case.B_init)
    error = (products(found.A, found.B) - want).abs().amax((2, 3)) / want.abs().amax((2, 3))
    assert error.max() <= 1e-3
    lost = case.init_cof * torch.einsum("e,enr,erk->nk", found.scale.double(), found.B.double(), found.A.double())
    residual = case.weight0 - lost
    assert (residual - case.arguments["weight"]).abs().max() <= 1e-5 * case.arguments["weight"].abs().max()
    assert found.error <= 1e-5


@pytest.mark.parametrize("start", [start for start in STARTS if start != "zero"])
def test_triples(start: str, seed: int) -> None:
    """s_e B_e A_e is the sum of the named triples over ρ, found with numpy's order of indices
    written out.
    """
    torch.manual_seed(seed)
    N, K, E, r, rho = 14, 17, 3, 2, 4.0
    W = torch.randn(N, K)
    U, sigma, Vh = torch.linalg.svd(W.double(), full_matrices=False)
    wanted = {
        "goat": [[0, 1], [4, 5], [8, 9]],
        "goat_mini": [[2, 3], [6, 7], [10, 11]],
        "pissa": [[0, 1], [2, 3], [4, 5]],
        "milora": [[8, 9], [10, 11], [12, 13]],
        "half": [[0, 1], [2, 11], [12, 13]],
    }[start]
    found = moe_start(W, E, r, start, scaling=[2.0, 3.0, 0.5], rho=rho)
    for e, index in enumerate(wanted):
        want = U[:, index] @ torch.diag(sigma[index]) @ Vh[index] / rho
        got = found.scale[e].double() * found.B[e].double() @ found.A[e].double()
        others = [i for i in range(len(sigma)) if i not in index]
        gap = (sigma[index][:, None] - sigma[others]).abs().min()
        limit = 8 * torch.finfo(torch.float32).eps * sigma[0] / gap  # Wedin: near values mix their vectors
        assert torch.linalg.matrix_norm(got - want) <= limit * torch.linalg.matrix_norm(want).clamp(min=gap / rho)
        norms = found.A[e].norm(dim=1) / found.B[e].norm(dim=0)
        assert (norms - 1).abs().max() <= 1e-5  # √σ' on both sides
    largest = found.A.gather(2, found.A.abs().argmax(2, keepdim=True))
    assert (largest > 0).all()
    assert torch.equal(found.A, moe_start(W, E, r, start, scaling=[2.0, 3.0, 0.5], rho=rho).A)


def test_bfloat16_weights_are_decomposed_in_float32(seed: int) -> None:
    torch.manual_seed(seed)
    W = torch.randn(12, 16).bfloat16()
    assert torch.equal(moe_start(W, 2, 2).A, moe_start(W.float(), 2, 2).A)


def test_randomized_svd_finds_the_largest(seed: int) -> None:
    """A weight with a decaying spectrum: PiSSA's start to the error that is stated; other starts
    are refused.
    """
    torch.manual_seed(seed)
    U, V = (torch.linalg.qr(torch.randn(n, 40, dtype=torch.float64)).Q for n in (60, 50))
    W = (U * 0.8 ** torch.arange(40)) @ V.T
    full, random = (moe_start(W, 2, 2, "pissa", svd=svd) for svd in ("full", "randomized"))
    want = products(full.A, full.B)
    assert random.error <= 1e-3
    assert (products(random.A, random.B) - want).abs().max() <= 1e-2 * want.abs().max()
    with pytest.raises(ValueError, match="svd must be 'full' for start='goat'"):
        moe_start(W, 2, 2, "goat", svd="randomized")


def test_scales(seed: int) -> None:
    torch.manual_seed(seed)
    W = torch.randn(24, 30)
    sigma = torch.linalg.svdvals(W.double())
    theory = math.sqrt(3 * 0.1 * 30 / 2)
    assert moe_start(W, 3, 2, eta=0.1).scale.tolist() == pytest.approx([theory] * 3)
    assert moe_start(W, 3, 2, scaling="alpha/r", alpha=8).scale.tolist() == [4] * 3
    assert moe_start(W, 3, 2, scaling="rslora", alpha=8).scale.tolist() == pytest.approx([8 / math.sqrt(2)] * 3)
    sums = [float(sigma[e * 8] + sigma[e * 8 + 1]) for e in range(3)]
    own = [theory * math.sqrt(sums[0] / s) for s in sums]
    assert moe_start(W, 3, 2, scaling="goat-s", eta=0.1).scale.tolist() == pytest.approx(own, rel=1e-5)
    assert moe_start(W, 3, 2, scaling=1.5).scale.tolist() == [1.5] * 3


def test_the_theorys_scale_brings_lora_to_full_fine_tuning(seed: int) -> None:
    """Theorem 3.5: with Kaiming A, B = 0, the first step s² g A Aᵀ moves W as η g does, on average
    over A.
    """
    torch.manual_seed(seed)
    E, r, K, eta = 400, 8, 32, 0.5
    found = moe_start(torch.randn(16, K), E, r, "zero", eta=eta)
    assert not found.B.any()
    mean = (found.scale[0] ** 2 * torch.einsum("erk,erl->kl", found.A, found.A) / E).double()
    # r·E samples: the diagonal's relative deviation is √(0.8 / (r E)), an off-diagonal entry's 1 /
    # √(r E)
    assert (mean - eta * torch.eye(K)).abs().max() <= 6 * eta / math.sqrt(r * E)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"r": 4}, "r must be at most min(N, K) // E = 3, got 4"),
        ({"start": "svd"}, "start must be one of"),
        ({"scaling": "auto"}, "scaling must be one of"),
        ({"scaling": [1.0]}, "scaling must be one for each of 4 experts"),
    ],
)
def test_errors(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 (the text is compared below)
        moe_start(**{"weight": torch.ones(12, 16), "experts": 4, "r": 2} | change)
    assert words in str(caught.value)
