"""The mixture's Triton kernels in the interpreter: against their formulas, ties, empty batches, NaN, whole calls."""

import os

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from delora_kernels.backends import eager
from delora_kernels.backends.triton.route import route, route_backward
from delora_kernels.testing.op_cases import OPS, OpDraw

KERNELS = {"route": route, "route_backward": route_backward}


@pytest.mark.parametrize("rank_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["route", "route_backward"])
def test_same_as_the_plain_form(name: str, rank_dtype: torch.dtype, seed: int) -> None:
    """To 1e-5 of the largest element, and to two roundings of a narrower h; every way to weigh."""
    for T, R in ((7, 3), (33, 1), (70, 20)):
        for arguments in OPS[name][0](OpDraw(T, 5, 6, R, torch.float32, rank_dtype, "cpu", seed)):
            ours = KERNELS[name](**arguments)
            theirs = getattr(eager, name)(**arguments)
            for got, want in zip(ours, theirs, strict=True):
                assert (got.dtype, got.shape) == (want.dtype, want.shape)
                if want.numel():
                    limit = 1e-5 if want.dtype == torch.float32 else torch.finfo(want.dtype).eps
                    assert (got.double() - want.double()).abs().max() <= limit * want.double().abs().max()


@pytest.mark.parametrize("E", [1, 3, 8, 64])
def test_ties_go_to_the_lowest_index(E: int) -> None:
    h = torch.zeros(5, E * 2 + E)
    _, w, fraction, *_ = route(h, None, torch.ones(E), None, E, 2, max(1, E // 2), True, False)
    expected = (torch.arange(E) < max(1, E // 2)).float()
    assert torch.equal(fraction, expected) or (fraction - expected).abs().max() <= 1e-6
    assert torch.equal(w != 0, (expected != 0).expand(5, E))


def test_no_tokens_and_unselected_experts_that_are_not_finite() -> None:
    E, r = 3, 2
    v, w, fraction, P, z = route(torch.zeros(0, E * r + E), None, torch.ones(E), None, E, r, 1, True, False)
    assert v.shape == (0, E * r)
    assert w.shape == (0, E)
    assert not torch.cat([fraction, P, z]).any()
    h = torch.ones(4, E * r + E)
    h[:, -E:] = torch.tensor([3.0, 0.0, 1.0])
    h[:, 2 * r - 1] = torch.inf  # of expert 1, which nobody chooses
    v, *_ = route(h, None, torch.ones(E), None, E, r, 1, True, False)
    assert torch.equal(v, torch.tensor([1.0, 1, 0, 0, 0, 0]).expand(4, -1))


def test_nan_logits_show_everywhere_in_their_row() -> None:
    h = torch.ones(3, 4 * 2 + 4)
    h[1, -2] = torch.nan
    v, *_ = route(h, None, torch.ones(4), None, 4, 2, 2, True, False)
    assert v[1].isnan().all()
    assert v[[0, 2]].isfinite().all()
