"""What a mixture of experts must show: gating costs little over plain LoRA, low ranks cost no more
than high ones.
"""

from benchmarks.report.by_case import Cases, Impls, name_of

OVER_LORA = 1.10
"""Of our LoRA of the same whole rank."""
OVER_RANK_16 = 1.05
"""Ranks 1, 2 and 4 of an expert, over rank 16: times over the frozen linear of their own rounds."""

HEAD = ["method", "T, K → N, r", "precision", "over LoRA", "over r=16", "authors' loop / ours"]
NOTE = f"Over our LoRA of the whole rank ≤ {OVER_LORA:.2f}, over rank 16 ≤ {OVER_RANK_16:.2f} for ranks 1, 2, 4."


def mixture_lines(cases: Cases) -> list[list[str]]:
    """Return a table's cells for each trained mixture: sizes, precision, over LoRA, over rank 16,
    the authors' loop over ours.

    A limit that is passed stands behind its number.
    """
    body = []
    for key, impls in cases.items():
        ours = over_frozen(impls, "dk")
        if key.E is None or not key.backward or ours is None:
            continue
        lora, loop = over_frozen(impls, "lora"), over_frozen(impls, "goat-eager")
        high = over_frozen(cases.get(key._replace(r=16), {}), "dk")
        cells = [_limited(ours, lora, OVER_LORA), _limited(ours, high if key.r < 16 else None, OVER_RANK_16)]
        body.append([name_of(key.method), key.sizes, key.conditions, *cells, f"{loop / ours:.2f}" if loop else ""])
    return body


def over_frozen(impls: Impls, name: str) -> float | None:
    """Time over the frozen linear; None: not measured."""
    return impls[name]["ratio_to_frozen"] if name in impls else None


def _limited(value: float, base: float | None, limit: float) -> str:
    if base is None:
        return ""
    ratio = value / base
    return f"{ratio:.2f}" + (f" (> {limit:.2f})" if ratio > limit else "")
