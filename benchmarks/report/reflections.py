"""What ETHER and ETHER+ must show: faster than the authors' form, near the frozen linear, little
kept for backward.
"""

from typing import Any

from benchmarks.report.by_case import Cases, Key, name_of
from benchmarks.report.mixtures import over_frozen

CPU_PLACE, FASTER = (1024, 2048, 2048, "fp32"), 1.8
"""T, K, N, precision at which ours must be that many times as fast as the authors' form, on a CPU.
"""
GPU_PLACE, OVER_FROZEN = (8192, 4096, 4096), {"ether": 1.15, "ether-plus-both": 1.30}
"""T, K, N at which a method may take that many times as long as the frozen linear, on a GPU."""
FLOATS = 4
"""Most of them kept for each token and block of a side, in four bytes each."""

HEAD = ["method", "T, K → N, n", "precision", "over frozen", "authors' form / ours", "kept, MiB", "authors' form keeps"]


def reflection_lines(cases: Cases, machine: dict[str, Any]) -> tuple[list[list[str]], str]:
    """Return a table's cells for each trained case, and a sentence on the limits.

    A limit that is not kept stands behind its number.
    """
    body: list[list[str]] = []
    met: list[bool] = []
    for key, impls in cases.items():
        ours = over_frozen(impls, "dk")
        if key.n_blocks is None or not key.backward or ours is None:
            continue
        authors = over_frozen(impls, "authors")
        most, least = _limits(key, machine)
        judged = [
            _judged(ours, most=most),
            _judged(authors and authors / ours, least=least),
            _judged(impls["dk"]["saved_mib"], most=kept_limit(key, impls["dk"]["dtype"])),
        ]
        met += [kept for _, kept in judged if kept is not None]
        theirs = f"{impls['authors']['saved_mib']:.2f}" if authors else ""
        body.append([name_of(key.method), key.sizes, key.conditions, *(text for text, _ in judged), theirs])
    return body, f"{_RULES} **{sum(met)} of {len(met)} limits kept.**"


_RULES = (
    f"Limits: on a CPU at T={CPU_PLACE[0]}, {CPU_PLACE[1]} → {CPU_PLACE[2]}, {CPU_PLACE[3]}, the authors' form / ours "
    f"≥ {FASTER:.2f}; on a GPU at T={GPU_PLACE[0]}, {GPU_PLACE[1]} → {GPU_PLACE[2]}, over the frozen linear "
    + ", ".join(f"{name_of(method)} ≤ {limit:.2f}" for method, limit in OVER_FROZEN.items())
    + "; kept beyond x, everywhere: a few numbers a token and block, and one [T, N] for an output side."
)


def kept_limit(key: Key, dtype: str) -> float:
    """MiB beyond x: FLOATS numbers for each token and block of a side, and one [T, N] in x's dtype
    for an output.
    """
    both = key.method.endswith("-both")
    output = (4 if dtype == "float32" else 2) * key.T * key.N if both else 0
    return (4 * FLOATS * key.T * (key.n_blocks or 1) * (1 + both) + output) / 2**20


def at_its_place(key: Key, machine: dict[str, Any]) -> bool:
    """Whether this is a case of reflections for which the device's time is limited."""
    if key.n_blocks is None or not key.backward:
        return False
    if machine["device"] == "cpu":
        return (key.T, key.K, key.N, key.precision) == CPU_PLACE
    return (key.T, key.K, key.N) == GPU_PLACE


def _limits(key: Key, machine: dict[str, Any]) -> tuple[float | None, float | None]:
    """Most time over the frozen linear, least over the authors' form."""
    if not at_its_place(key, machine):
        return None, None
    return (None, FASTER) if machine["device"] == "cpu" else (OVER_FROZEN.get(key.method), None)


def _judged(value: float | None, most: float | None = None, least: float | None = None) -> tuple[str, bool | None]:
    """Return the cell of a number, and whether it keeps its limit; None: it has none. What was not
    measured keeps none.
    """
    limit = most if least is None else least
    if value is None:
        return "", None if limit is None else False
    kept = None if limit is None else value <= limit if least is None else value >= limit
    return f"{value:.2f}" + (f" ({'>' if least is None else '<'} {limit:.2f})" if kept is False else ""), kept
