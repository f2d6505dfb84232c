"""The mixture's CUDA kernels on the CPU: ties, empty batches, many experts, NaN, experts that nobody chooses."""

import pytest
import torch
from host_backend import shuffle_threads

from delora_kernels.backends.cuda.route import route, route_backward
from delora_kernels.backends.eager import route as eager
from delora_kernels.testing.draw import Draw


@pytest.mark.parametrize("E", [1, 3, 8, 33, 64])
def test_ties_go_to_the_lowest_index(E: int) -> None:
    h = torch.zeros(5, E * 2 + E)
    _, w, fraction, *_ = route(h, None, torch.ones(E), None, E, 2, max(1, E // 2), True, False)
    expected = (torch.arange(E) < max(1, E // 2)).float()
    assert (fraction - expected).abs().max() <= 1e-6
    assert torch.equal(w != 0, (expected != 0).expand(5, E))


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("E", [2, 40, 100])
def test_many_experts_and_tokens(E: int, shared: bool, seed: int) -> None:
    """More experts than lanes, more tokens than a block has: as the eager backend, to 1e-5."""
    shuffle_threads(seed)
    draw, r, T = Draw(75, 1, 1, 3, seed), 3, 75
    h = draw.normal(T, (1 if shared else E) * r + E + 5).float()
    scale, share = draw.normal(E).float(), draw.normal(T).abs().float()
    forward = (h, None, scale, share, E, r, max(1, E // 3), True, shared)
    ours, theirs = route(*forward), eager.route(*forward)
    dv, dP, dz = torch.randn_like(theirs[0]), draw.normal(E).float(), draw.normal(1).float()
    backward = (dv, h, theirs[1], scale, share, dP, dz, True, False, E, r, True, shared)
    for got, want in zip((*ours, *route_backward(*backward)), (*theirs, *eager.route_backward(*backward)), strict=True):
        assert got.shape == want.shape
        assert not want.numel() or (got - want).abs().max() <= 1e-5 * want.abs().max()


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
