"""The gradient of a mixture's gating in CUDA kernels on the CPU: from parts of dv, with many
experts, NaN and Inf; what
is launched."""

import pytest
import torch
from gatings import assert_close, gatings, note_launches
from host_backend import shuffle_threads

from delora_kernels.backends.cuda import route
from delora_kernels.backends.eager import route as eager
from delora_kernels.backends.library_gemm import DyParts
from delora_kernels.op_arguments import Gated, Gating
from delora_kernels.testing.draw import Draw


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize(("E", "r"), [(2, 3), (32, 17), (33, 17), (100, 3), (512, 2)])
def test_many_experts_and_tokens(E: int, r: int, shared: bool, seed: int) -> None:
    """As few experts as lanes share and more than a warp has, more tokens than a block has, more
    columns than a warp
    has at a time; as the eager backend, to 1e-5."""
    shuffle_threads(seed)
    T, N, passed = 75, 9, 5
    draw = Draw(T, 1, N, r, seed)
    parts = draw.normal(2, T, (1 if shared else E) * r + E + passed).float()
    scale, share = draw.normal(E).float(), draw.normal(T).abs().float()
    share[::4] = 0
    gating = (None, max(1, E // 3), Gating(E, r, True, shared, scale, share))
    h, *ours = route.route(parts, torch.float32, *gating)
    theirs = eager.route(h, *gating)
    assert_close(ours, theirs)
    dv, product, sums = draw.normal(3, T, E * r + passed).float(), draw.normal(4, N, E * r + passed), draw.normal(4, N)
    dP, dz = draw.normal(E).float(), draw.normal(1).float()
    backward = (Gated(h, theirs[1], False, dP, dz, True), gating[2])
    dh, dB, dy_sum, *of_gates = route.route_backward(DyParts(dv, product.float(), sums.float(), None), *backward)
    wanted = eager.route_backward(dv.sum(0), *backward)
    assert_close((dh, *of_gates, dB, dy_sum), (*wanted, product.sum(0), sums.sum(0)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_parts_of_dv_are_rounded_as_dv_would_be(dtype: torch.dtype, seed: int) -> None:
    """The bits that dv itself gives, added in the order of its parts and rounded."""
    T, E, r = 67, 5, 7
    draw = Draw(T, 1, 1, r, seed)
    for columns, (gates, k, gating) in gatings(draw, T, E, r):
        given = gates is not None
        width = columns + (0 if given else E)
        parts = draw.normal(6, T, columns + (E - 1) * r * gating.shared).float()
        h, w = draw.normal(T, width).to(dtype), gates
        if w is None:
            w = eager.route(h, gates, k, gating)[1]
        plain = torch.zeros_like(parts[0])
        for part in parts:
            plain += part
        results = []
        for dv in (parts, plain[None].to(dtype), plain[None]):
            shuffle_threads(seed + len(results))
            gated = Gated(h, w, given, gating.scale, gating.scale[:1].contiguous(), True)
            results.append(route.route_backward(DyParts(dv, None, None, None), gated, gating))
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("need_scale", [False, True])
@pytest.mark.parametrize(("r", "reads"), [(8, ["dy_sums"]), (9, ["token_sums", "times_small"])])
def test_launches_backward(r: int, reads: list[str], need_scale: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One beside the reads of dy, with ds two: nothing adds the parts of dv or of dB̂ before."""
    T, N, E = 70, 300, 4
    h, v, w, B_hat = (torch.randn(shape) for shape in ((T, E * r + E), (T, E * r), (T, E), (N, E * r)))
    launched = note_launches(monkeypatch)
    gated = Gated(h, w, False, torch.ones(E), torch.ones(1), need_scale)
    backward = (True, gated, Gating(E, r, True, False, torch.ones(E)))
    route.expand_route_backward(torch.randn(T, N), v, B_hat, *backward)
    assert launched == [*reads, "route_backward", *(["route_totals"] if need_scale else [])]


def test_tokens_without_a_share_have_no_say_and_experts_without_a_weight_no_part(seed: int) -> None:
    """Even if NaN or Inf: statistics are those of the eager backend, its gradients are finite in
    the same places.
    """
    T, E, r = 40, 6, 3
    draw = Draw(T, 1, 1, r, seed)
    for columns, gating in gatings(draw, T, E, r):
        gates, _, terms = gating
        given, share = gates is not None, terms.token_share
        h = draw.normal(T, columns + (0 if given else E)).float()
        w = eager.route(h, *gating)[1] if gates is None else gates
        dv = draw.normal(T, columns + (E - 1) * r * terms.shared).float()
        dP, dz = draw.normal(E).float(), draw.normal(1).float()
        for row in range(T // 2):
            dv[row, row % dv.shape[1]] = torch.inf
        for some_dP in (dP, dP / 0):
            backward = (Gated(h, w, given, some_dP, dz, True), terms)
            dh, _, _, *ours = route.route_backward(DyParts(dv[None], None, None, None), *backward)
            for got, want in zip((dh, *ours), eager.route_backward(dv, *backward), strict=True):
                assert torch.equal(got.isfinite(), want.isfinite())
        if share is not None:
            for rows in (h, gates):
                if rows is not None:
                    rows[share == 0] = torch.nan
            assert_close(route.route(h[None], torch.float32, *gating)[3:], eager.route(h, *gating)[2:])
