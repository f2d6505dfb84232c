"""The mixture's CUDA kernels on the CPU: gated where h is projected and where its parts are added,
the same bits both
ways; ties, empty batches, many experts, NaN, experts that nobody chooses; what is launched."""

import pytest
import torch
from gatings import gatings, note_launches
from host_backend import SANITIZED, shuffle_threads

from delora_kernels.backends.cuda import launch, route
from delora_kernels.backends.eager import route as eager
from delora_kernels.op_arguments import Gated, Gating, Masks
from delora_kernels.testing.draw import Draw

WIDE, HALF, BF16 = torch.float32, torch.float16, torch.bfloat16
DTYPES = [(WIDE, WIDE), (HALF, HALF), (BF16, BF16), (HALF, WIDE), (BF16, WIDE)]
"""Of x and of the factors."""
SHAPES = 4 if SANITIZED else 24


def _names(dtypes: tuple[torch.dtype, ...]) -> str:
    return "+".join(str(dtype).removeprefix("torch.") for dtype in dtypes)


@pytest.fixture
def launched(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    return note_launches(monkeypatch)


@pytest.mark.parametrize("dtypes", DTYPES, ids=_names)
def test_the_same_bits_both_ways(
    dtypes: tuple[torch.dtype, torch.dtype], seed: int, monkeypatch: pytest.MonkeyPatch, launched: list[str]
) -> None:
    """Gated by the kernel that projects, or by a launch of its own that reads h: h, v and w; sums
    over tokens are
    grouped in other blocks."""
    monkeypatch.setattr(launch, "SPLIT_TARGET", 1)
    generator = torch.Generator().manual_seed(seed)
    for case in range(SHAPES):
        T, K, E, r = (int(torch.randint(1, most, (), generator=generator)) for most in (200, 150, 8, 7))
        draw = Draw(T, K, 1, r, seed + case)
        x, p = draw.normal(T, K).to(dtypes[0]), 0.3 * (case % 2)
        mask = torch.tensor(seed) if p else None
        for columns, gating in gatings(draw, T, E, r):
            A_hat = draw.normal(columns + (E if gating[0] is None else 0), K).to(dtypes[1])
            results = []
            for largest in (launch.TILE, 0):
                monkeypatch.setattr(route, "LARGEST_COLUMNS", largest)
                shuffle_threads(seed + case + largest)
                launched.clear()
                results.append(route.project_route(x, A_hat, Masks([], [p], mask), *gating))
                whole = len(A_hat) <= largest
                assert launched == [*(["project_route"] if whole else ["times_small", "route"]), "route_totals"]
            assert all(torch.equal(a, b) for a, b in zip(*(result[:3] for result in results), strict=True))
            terms = gating if gating[0] is None else (gating[0].abs(), *gating[1:])  # given gates may cancel
            for ours, theirs, size in zip(
                *(result[3:] for result in results), eager.route(results[0][0], *terms)[2:], strict=True
            ):
                assert (ours - theirs).abs().max() <= 1e-5 * size.abs().max()


@pytest.mark.parametrize("dtype", [WIDE, HALF, BF16])
@pytest.mark.parametrize(("E", "r"), [(5, 7), (33, 3)])
def test_parts_are_added_in_their_order_and_gated_as_rounded(E: int, r: int, dtype: torch.dtype, seed: int) -> None:
    """h has the bits of a plain sum, part by part; v, w and the statistics those of h gated on its
    own.
    """
    T = 67
    draw = Draw(T, 1, 1, r, seed)
    for columns, gating in gatings(draw, T, E, r):
        parts = draw.normal(5, T, columns + (E if gating[0] is None else 0)).float()
        shuffle_threads(seed)
        h, *ours = route.route(parts, dtype, *gating)
        plain = torch.zeros_like(parts[0])
        for part in parts:
            plain += part
        assert torch.equal(h, plain.to(dtype))
        shuffle_threads(seed + 1)
        _, *theirs = route.route(h[None], dtype, *gating)
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("E", [1, 3, 8, 33, 64])
def test_ties_go_to_the_lowest_index(E: int) -> None:
    h = torch.zeros(1, 5, E * 2 + E)
    *_, w, fraction, _, _ = route.route(h, WIDE, None, max(1, E // 2), Gating(E, 2, True, False, torch.ones(E)))
    expected = (torch.arange(E) < max(1, E // 2)).float()
    assert (fraction - expected).abs().max() <= 1e-6
    assert torch.equal(w != 0, (expected != 0).expand(5, E))


def test_launches_forward(monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Two where the sum over K is in one piece and h has few columns, else three; one more for each
    more mask.
    """
    for target, T, K, E, r, masks, expected in (
        (1, 70, 90, 4, 3, 1, ["project_route"]),
        (528, 70, 60, 4, 3, 1, ["project_route"]),
        (528, 70, 90, 4, 3, 1, ["times_small", "route"]),
        (1, 70, 90, 4, 20, 1, ["times_small", "route"]),
        (1, 70, 90, 33, 1, 1, ["times_small", "route"]),
        (1, 70, 90, 4, 3, 2, ["times_small", "times_small", "route"]),
        (528, 70, 90, 4, 3, 2, ["times_small", "times_small", "route"]),
    ):
        monkeypatch.setattr(launch, "SPLIT_TARGET", target)
        launched.clear()
        drops = Masks([E * r, E], [0.5, 0.0], torch.arange(2)) if masks == 2 else Masks()
        gating = (None, 1, Gating(E, r, True, False, torch.ones(E)))
        route.project_route(torch.randn(T, K), torch.randn(E * r + E, K), drops, *gating)
        assert launched == [*expected, "route_totals"], (target, T, K, E, r, masks)


@pytest.mark.parametrize("target", [1, 528])
def test_what_is_not_finite(target: int, monkeypatch: pytest.MonkeyPatch, launched: list[str]) -> None:
    """Inf in an expert that nobody chooses does not show, a NaN logit shows in all of v; both
    ways.
    """
    monkeypatch.setattr(launch, "SPLIT_TARGET", target)
    E, r, T, K = 3, 2, 70, 1 if target == 1 else 100
    x = torch.zeros(T, K)
    x[:, 0] = 1
    h = torch.tensor([1.0, 1, 1, torch.inf, 1, 1, 3, 0, 1])  # expert 1 is not chosen
    for k, logit, expected in ((1, 3.0, [1.0, 1, 0, 0, 0, 0]), (2, torch.nan, [torch.nan] * 6)):
        h[E * r] = logit
        A_hat = torch.zeros(len(h), K)
        A_hat[:, 0] = h
        _, v, *_ = route.project_route(x, A_hat, Masks(), None, k, Gating(E, r, True, False, torch.ones(E)))
        assert torch.equal(v.nan_to_num(7), torch.tensor(expected).expand(T, -1).nan_to_num(7)), k
    assert launched[0] == ("project_route" if target == 1 else "times_small")


def test_nan_logits_stay_in_their_row() -> None:
    h = torch.ones(1, 3, 4 * 2 + 4)
    h[0, 1, -2] = torch.nan
    _, v, *_ = route.route(h, WIDE, None, 2, Gating(4, 2, True, False, torch.ones(4)))
    assert v[1].isnan().all()
    assert v[[0, 2]].isfinite().all()


@pytest.mark.parametrize("blocks", [1, 31, 33, 100])
def test_totals(blocks: int, seed: int) -> None:
    """More blocks than lanes add up, too."""
    sums = torch.randn(blocks, 7, generator=torch.Generator().manual_seed(seed))
    f, P, z = torch.empty(3), torch.empty(3), torch.empty(1)
    launch.launch("route_totals", sums, blocks, 3, 8.0, f, P, z)
    assert (torch.cat([f, P, z]) - sums.double().sum(0) / 8).abs().max() <= 1e-6 * blocks
    launch.launch("route_totals", sums.flatten()[: blocks * 3], blocks, 3, 1.0, f, None, None)
    assert (f - sums.flatten()[: blocks * 3].view(blocks, 3).double().sum(0)).abs().max() <= 1e-6 * blocks


def test_what_the_launchers_refuse() -> None:
    """More columns or experts than a block has room for."""
    for E, r, share in ((33, 1, True), (5, 12, False)):
        columns = (r if share else E * r) + E
        x, small, h = torch.zeros(4, 6), torch.zeros(6, columns), torch.zeros(4, columns)
        gated = (h, None, torch.ones(E), None, torch.zeros(4, E * r), torch.zeros(4, E), torch.zeros(1, 2 * E + 1))
        with pytest.raises(RuntimeError, match=r"project_route\(.*a size out of range"):
            launch.launch("project_route", x, small, 6, *gated, 4, E, r, 0, 1, True, share, None, 0, 1.0)
    with pytest.raises(RuntimeError, match=r"route\(.*a size out of range"):
        route.route(torch.zeros(1, 2, 1026), WIDE, None, 1, Gating(513, 1, True, False, torch.ones(513)))


def test_no_tokens(seed: int) -> None:
    E, r, K, N = 3, 2, 5, 4
    A_hat, scale = torch.randn(E * r + E, K), torch.ones(E)
    gating = Gating(E, r, True, False, scale)
    h, v, w, *sums = route.project_route(torch.zeros(0, K), A_hat, Masks(), None, 1, gating)
    assert h.shape == (0, E * r + E)
    assert v.shape == (0, E * r)
    assert w.shape == (0, E)
    assert not torch.cat(sums).any()
    backward = (True, Gated(h, w, False, torch.ones(E), torch.ones(1), True), gating)
    dh, *rest = route.expand_route_backward(torch.zeros(0, N), v, torch.randn(N, E * r), *backward)
    assert dh.shape == h.shape
    assert [tuple(found.shape) for found in rest] == [(N, E * r), (N,), (0,), (E,)]
    assert not any(found.any() for found in rest)
