"""What a mixture of experts must show: gating costs little over plain LoRA, low ranks cost no more than high ones."""

from typing import Any

from benchmarks.cases import BOTH

Row = dict[str, Any]
Cases = dict[tuple[Any, ...], dict[str, Row]]

OVER_LORA = 1.10
"""Of our LoRA of the same whole rank."""
OVER_RANK_16 = 1.05
"""Ranks 1, 2 and 4 of an expert, over rank 16: times over the frozen linear of their own rounds."""
_RANK = 5


def mixture_lines(cases: Cases) -> list[list[str]]:
    """A table's cells for each trained mixture: sizes, precision, over LoRA, over rank 16, the authors' loop over ours.

    Args:
        cases: As benchmarks.report.tables.by_case. A limit that is passed stands behind its number.
    """
    body = []
    for key, impls in cases.items():
        ours = _over_frozen(impls, "dk")
        if impls[next(iter(impls))]["E"] is None or key[-1] != BOTH or ours is None:
            continue
        method, _, T, K, N, r, E, precision, k, dropout, _ = key
        cells = [
            method,
            f"{T}, {K} → {N}, {r}, E={E}, k={k}",
            precision + (f", dropout {dropout:g}" if dropout else ""),
        ]
        lora, loop = _over_frozen(impls, "lora"), _over_frozen(impls, "goat-eager")
        high = _over_frozen(cases.get((*key[:_RANK], 16, *key[_RANK + 1 :]), {}), "dk")
        cells += [_limited(ours, lora, OVER_LORA), _limited(ours, high if r < 16 else None, OVER_RANK_16)]
        body.append([*cells, f"{loop / ours:.2f}" if loop else ""])
    return body


HEAD = ["method", "T, K → N, r", "precision", "over LoRA", "over r=16", "authors' loop / ours"]


def _over_frozen(impls: dict[str, Row], name: str) -> float | None:
    return impls[name]["ratio_to_frozen"] if name in impls else None


def _limited(value: float, base: float | None, limit: float) -> str:
    if base is None:
        return ""
    ratio = value / base
    return f"{ratio:.2f}" + (f" (> {limit:.2f})" if ratio > limit else "")
