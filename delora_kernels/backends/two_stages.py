"""A mixture's two ops as two stages each, for a backend whose stages are launches of their own."""

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

Stage = Callable[..., Any]


def project_then_route(project: Stage, route: Stage) -> Stage:
    """The op `project_route` of project, and of route(h, gates, scale, ...) → v, w, f, P, z."""

    def project_route(
        x: Tensor, A_hat: Tensor, ranks: Sequence[int], dropout_p: Sequence[float], seed: Tensor | None, *gating: Any
    ) -> tuple[Tensor, ...]:
        h = project(x, A_hat, ranks, dropout_p, seed)
        return h, *route(h, *gating)

    return project_route


def expand_then_route_backward(expand_backward: Stage, route_backward: Stage) -> Stage:
    """The op `expand_route_backward` of expand_backward, and of route_backward(dv, h, w, ...) → dh, d gates, ds."""

    def expand_route_backward(
        dy: Tensor, v: Tensor | None, B_hat: Tensor, need_bias: bool, *gating: Any
    ) -> tuple[Tensor, ...]:
        dv, dB_hat, _, dy_sum = expand_backward(dy, v, B_hat, 1.0, None, None, False, None, need_bias)
        dh, dgates, dscale = route_backward(dv, *gating)
        return dh, dB_hat, dy_sum, dgates, dscale

    return expand_route_backward
