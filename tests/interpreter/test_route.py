"""The mixture's Triton kernels in the interpreter: against their formulas, ties, empty batches,
NaN, whole calls.
"""

import importlib
import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels.backends import eager
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.project_route import project_route
from delora_kernels.backends.triton.route import route
from delora_kernels.backends.triton.route_backward import expand_route_backward
from delora_kernels.op_arguments import Gating, Masks
from delora_kernels.testing.ops.cases import OPS, OpDraw
from delora_kernels.testing.ops.cases import arguments as packed

KERNELS = {"project_route": project_route, "expand_route_backward": expand_route_backward}
SPLIT = {"whole": 1, "split": 1000}


@pytest.fixture(params=SPLIT)
def target(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Sums in one piece, gated where they are made, and in parts, gated where they are added."""
    monkeypatch.setattr(tables, "SPLIT_TARGET", SPLIT[request.param])
    return str(request.param)


@pytest.mark.parametrize("rank_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", KERNELS)
def test_same_as_the_plain_form(name: str, rank_dtype: torch.dtype, target: str, seed: int) -> None:
    """To 1e-5 of the largest element, and to two roundings of a narrower h; every way to weigh."""
    for T, K, N, R in ((7, 5, 6, 3), (33, 130, 70, 1), (70, 70, 130, 20)):
        for arguments in OPS[name][0](OpDraw(T, K, N, R, rank_dtype, rank_dtype, "cpu", seed)):
            ours, theirs = KERNELS[name](*packed(name, arguments)), getattr(eager, name)(*packed(name, arguments))
            for got, want in zip(ours, theirs, strict=True):
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                if want.numel():
                    limit = 1e-5 if rank_dtype == torch.float32 else 4 * torch.finfo(rank_dtype).eps
                    assert (got.double() - want.double()).abs().max() <= limit * want.double().abs().max()


def test_one_launch_projects_and_gates_where_nothing_is_split(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """One adapter, no mask: else, and where the sum over K has parts, the launch that adds them
    gates.
    """
    calls: list[str] = []
    fused = importlib.import_module(project_route.__module__)
    for name in ("route", "times_small_parts"):
        kernel = getattr(fused, name)
        monkeypatch.setattr(fused, name, lambda *a, n=name, k=kernel: calls.append(n) or k(*a))
    for number, arguments in enumerate(OPS["project_route"][0](OpDraw(9, 70, 6, 3, *[torch.float32] * 2, "cpu", 1))):
        calls.clear()
        project_route(*packed("project_route", arguments))
        apart = target == "split" or arguments["shared"] or arguments["seed"] is not None
        assert calls == (["times_small_parts", "route"] if apart else []), number


@pytest.mark.parametrize("E", [1, 3, 8, 64])
def test_ties_go_to_the_lowest_index(E: int, target: str) -> None:
    gating = (None, max(1, E // 2), Gating(E, 2, True, False, torch.ones(E)))
    x, A_hat = torch.zeros(5, 7), torch.ones(E * 2 + E, 7)
    _, _, w, fraction, *_ = project_route(x, A_hat, Masks(), *gating)
    expected = (torch.arange(E) < max(1, E // 2)).float()
    assert torch.equal(fraction, expected) or (fraction - expected).abs().max() <= 1e-6
    assert torch.equal(w != 0, (expected != 0).expand(5, E))


def test_no_tokens_and_unselected_experts_that_are_not_finite() -> None:
    E, r = 3, 2
    gating = (torch.float32, None, 1, Gating(E, r, True, False, torch.ones(E)))
    _, v, w, fraction, P, z = route(torch.zeros(1, 0, E * r + E), *gating)
    assert v.shape == (0, E * r)
    assert w.shape == (0, E)
    assert not torch.cat([fraction, P, z]).any()
    for parts in (1, 2):
        h = torch.ones(parts, 4, E * r + E) / parts
        h[0, :, -E:] = torch.tensor([3.0, 0.0, 1.0])
        h[0, :, 2 * r - 1] = torch.inf  # of expert 1, which nobody chooses
        _, v, *_ = route(h, *gating)
        assert torch.equal(v, torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(4, -1))


def test_nan_shows_everywhere_in_its_row(target: str) -> None:
    x, A_hat = torch.ones(3, 70), torch.ones(4 * 2 + 4, 70)
    x[1, 3] = torch.nan
    gating = (None, 2, Gating(4, 2, True, False, torch.ones(4)))
    _, v, *_ = project_route(x, A_hat, Masks(), *gating)
    assert v[1].isnan().all()
    assert v[[0, 2]].isfinite().all()


def test_experts_that_nobody_chooses_do_not_count_even_where_they_are_not_finite() -> None:
    x, A_hat = torch.eye(4, 6), torch.ones(4 * 2 + 4, 6)
    A_hat[2:4, 0] = torch.inf  # of expert 1, for the first token
    A_hat[-4:, 0] = torch.tensor([3.0, -9.0, 1.0, 2.0])
    _, v, *_ = project_route(x, A_hat, Masks(), None, 2, Gating(4, 2, True, False, torch.ones(4)))
    assert v[0].isfinite().all()
    assert torch.equal(v[0, 2:6], torch.zeros(4))
