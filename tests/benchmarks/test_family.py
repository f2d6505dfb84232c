"""The family of methods: what one rung shares with the next, the bounds that each keeps, that all
of them train.
"""

import pytest
import torch
from torch import nn

from benchmarks.family import RUNGS, Multiplicative, Rung, Task, climb, loss_of, parts_of_bounds, task
from delora_kernels.nn import DeLoRALinear, EtherPlusLinear
from delora_kernels.testing import relative_error


@pytest.fixture(scope="module")
def given() -> Task:
    torch.manual_seed(0)
    return task(60)


@pytest.mark.parametrize("rung", RUNGS, ids=lambda rung: rung.name)
def test_every_rung_trains_within_its_bound(rung: Rung, given: Task) -> None:
    """It starts at the frozen network (but for ETHER, which never is), the loss falls, no step
    breaks the bound.
    """
    torch.manual_seed(0)
    found = climb(rung, given, 12)
    frozen = loss_of(*given).item()
    assert (abs(found.start - frozen) <= 1e-5 * frozen) == (rung.name != "ETHER")
    assert found.loss < 0.98 * found.start
    if rung.formula == "none":
        assert found.most == 0
    else:
        assert 0 < found.part <= found.most <= 1


@pytest.mark.parametrize("rung", RUNGS[1:], ids=lambda rung: rung.name)
def test_bounds_hold_for_any_factors(rung: Rung, seed: int) -> None:
    """Also for factors of any size, none of which training would reach."""
    torch.manual_seed(seed)
    frozen = nn.Sequential(nn.Linear(6, 9), nn.Linear(9, 5)).requires_grad_(False)
    for size in (1e-2, 1.0, 1e2):
        adapted = nn.Sequential(*(rung.make(m) for m in frozen))
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.data = torch.randn_like(parameter) * (1 if name.endswith("lam") else size)
        assert max(parts_of_bounds(rung, adapted, frozen)) <= 1 + 1e-5


def test_ether_plus_is_one_pair_with_lambda_2(seed: int) -> None:
    torch.manual_seed(seed)
    linear = nn.Linear(7, 5).double().requires_grad_(False)
    ether, scaled = (
        EtherPlusLinear.from_linear(linear, side="output"),
        Multiplicative(linear, 1, relaxed=False).double(),
    )
    with torch.no_grad():
        v, u = torch.randn(2, 5).double()
        ether.u_out[0], ether.v_out[0] = u, v
        scaled.A.copy_(torch.stack([v, u]))
    x = torch.randn(4, 7).double()
    assert relative_error(scaled(x), ether(x)) <= 1e-13


def test_relaxed_vectors_of_an_orthogonal_weight_are_delora(seed: int) -> None:
    """ΔW = (λ / r) Σ b̂ âᵀ W, and with rows a W in the place of a: DeLoRA with n = 1."""
    torch.manual_seed(seed)
    linear = nn.Linear(6, 6).double().requires_grad_(False)
    linear.weight.copy_(torch.linalg.qr(linear.weight).Q)
    relaxed = Multiplicative(linear, 2, relaxed=True).double()
    delora = DeLoRALinear.from_linear(linear, r=4, lam=1.0, weight_norm="frobenius")
    assert relaxed.B is not None
    with torch.no_grad():
        relaxed.B.copy_(torch.randn(4, 6))
        delora.weight_norm.fill_(1.0)
        delora.A.copy_(relaxed.A @ linear.weight)
        delora.B.copy_((relaxed.B * relaxed.sign[:, None]).T)
    x = torch.randn(4, 6).double()
    assert relative_error(relaxed(x), delora(x)) <= 1e-13
