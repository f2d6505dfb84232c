"""What the tests of a mixture's kernels share: the options of its gating, what was launched, how
close results are.
"""

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from delora_kernels.backends.cuda import dy_sums, kernels, launch, route
from delora_kernels.op_arguments import Gating
from delora_kernels.testing.draw import Draw


def gatings(draw: Draw, T: int, E: int, r: int) -> Iterator[tuple[int, tuple[Any, ...]]]:
    """Columns that h has beside its logits', gates, top_k and `Gating`, every option once."""
    scale, share = draw.normal(E).float(), draw.normal(T).abs().float()
    share[1::3] = 0
    gates = draw.normal(T, E).float()
    gates[gates.abs() < 0.5] = 0
    some = max(1, E // 2)
    yield E * r, (None, some, Gating(E, r, True, False, scale))
    yield E * r + 3, (None, some, Gating(E, r, False, False, scale, share))
    yield E * r, (None, E, Gating(E, r, True, False, scale))
    yield r + 2, (None, 1, Gating(E, r, True, True, scale, share))
    yield E * r + 1, (gates, some, Gating(E, r, True, False, scale, share))
    yield r, (gates, some, Gating(E, r, False, True, scale))


def note_launches(patch: pytest.MonkeyPatch) -> list[str]:
    """The kernels that run from now on."""
    names: list[str] = []

    def noted(name: str, *arguments: Tensor | float | bool | None) -> None:
        names.append(name)
        launch.launch(name, *arguments)

    for module in (dy_sums, kernels, route):
        patch.setattr(module, "launch", noted)
    return names


def assert_close(ours: Any, theirs: Any) -> None:
    """To 1e-5 of the largest element."""
    for got, want in zip(ours, theirs, strict=True):
        assert got.shape == want.shape
        assert not want.numel() or (got - want).abs().max() <= 1e-5 * want.abs().max()
