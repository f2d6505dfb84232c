"""Random float64 arguments of the ETHER functions, reflections into or out of the layer, or
both.
"""

from typing import Any

from reference_calls import Maker

SIDES = {"into": ("u", "v"), "out_of": ("u_out", "v_out")}


def ether_arguments(
    maker: Maker, plus: bool, sides: tuple[str, ...], T: int, K: int, N: int, n: int = 2
) -> dict[str, Any]:
    """Every argument of `ether_linear`, or of `ether_plus_linear`, with n blocks; K and N are
    multiples of n.
    """
    made: dict[str, Any] = {"x": maker.tensor(T, K), "weight": maker.tensor(N, K), "bias": maker.tensor(N)}
    for side in sides:
        for name in SIDES[side][: 2 if plus else 1]:
            made[name] = maker.tensor(n, (K if side == "into" else N) // n)
    return made
