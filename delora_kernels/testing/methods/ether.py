"""Random vectors of ETHER's reflections, for one side or both."""

from typing import Any

from torch import Tensor

from delora_kernels.testing.draw import Draw
from delora_kernels.testing.methods.method import Method


def blocks_of(features: int, most: int) -> int:
    """Return the largest number of equal blocks up to `most` (or 2), each of two features at least
    where there are two.
    """
    wanted = (n for n in range(max(2, most), 0, -1) if features % n == 0 and features // n >= 2)
    return next(wanted, 1)


def _vectors(draw: Draw, features: int) -> Tensor:
    n = blocks_of(features, draw.r)
    return draw.normal(n, features // n)


def _alone(made: dict[str, Any]) -> dict[str, Any]:
    """Without the low-rank factors that every problem starts with."""
    return made | {"A": None, "B": None}


def ether(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw vectors that reflect the input."""
    return _alone({"u": _vectors(draw, draw.K)})


def ether_both(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Input and output reflected."""
    return ether(draw, base) | {"u_out": _vectors(draw, draw.N)}


def ether_official(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Row groups of W reflected on their input side, as in the authors' code."""
    return ether(draw, base) | {"blocks": "official"}


def ether_plus(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Draw vectors of relaxed reflections of the input."""
    return ether(draw, base) | {"v": _vectors(draw, draw.K)}


def ether_plus_both(draw: Draw, base: dict[str, Tensor]) -> dict[str, Any]:
    """Input and output reflected, relaxed."""
    both = ether_both(draw, base) | {"v": _vectors(draw, draw.K)}
    return both | {"v_out": _vectors(draw, draw.N)}


_OPTIONS: dict[str, Any] = {"through_x": ("du", "dv", "du_out", "dv_out")}

METHODS = (
    Method("ether", "ether_linear", ether, **_OPTIONS),
    Method("ether-both", "ether_linear", ether_both, **_OPTIONS),
    Method("ether-official", "ether_linear", ether_official, **_OPTIONS),
    Method("ether-plus", "ether_plus_linear", ether_plus, **_OPTIONS),
    Method("ether-plus-both", "ether_plus_linear", ether_plus_both, **_OPTIONS),
)
