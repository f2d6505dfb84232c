"""What the kernels are asked to reach, and whether an estimate does: a column beside each layer of
`python -m benchmarks.model --from-binaries`.

Absolute where a number was set (T=8192, bfloat16 autocast, over the frozen linear); else beside
another estimated layer of the same shape.
"""

from typing import Any

Row = dict[str, Any]

SHAPES = ((4096, 4096), (4096, 14336), (14336, 4096), (8192, 8192))
LORA, DORA = (1.18, 1.09, 1.11, 1.08), (1.28, 1.18, 1.19, 1.15)
"""By shape, at rank 16."""
ABSOLUTE: dict[tuple[str, int, int], float] = {
    (f"{method} r=16", *shape): most
    for method, mosts in (("lora", LORA), ("delora", LORA), ("dora", DORA))
    for shape, most in zip(SHAPES, mosts, strict=True)
}
SIBLINGS = 1.12
"""Three siblings over their products."""
ETHER_PLUS = 1.30
"""ETHER+ on both sides, at every shape."""
BESIDE: dict[str, tuple[str, float]] = {
    "lora r=64": ("lora r=16", 0.06),
    "delora r=64": ("delora r=16", 0.06),
    "dora r=64": ("dora r=16", 0.06),
    "goat E=8 r=2": ("lora r=16", 0.05),
}
"""Layer → another of its shape, and how much more it may take."""
ROW_NORM = 2.5
"""Times what its bytes alone would take."""


def asked(row: Row, rows: list[Row]) -> float | None:
    """Return the largest ratio asked of a row; None: nothing is, or what it is held against was not
    estimated.
    """
    title, shape = row["layer"], (row["K"], row["N"])
    if row["summed_us"]:
        return SIBLINGS
    if title == "ether-plus-both":
        return ETHER_PLUS
    if title in BESIDE:
        other, more = BESIDE[title]
        found = [each["ratio"] for each in rows if (each["layer"], each["K"], each["N"]) == (other, *shape)]
        return round(found[0] + more, 3) if found else None
    return ABSOLUTE.get((title, *shape))


def holds(row: Row, rows: list[Row]) -> bool | None:
    """Whether a row's ratio, as it is printed, is what is asked; None: nothing is."""
    most = asked(row, rows)
    return None if most is None else round(row["ratio"], 2) <= round(most, 2)


def cell(row: Row, rows: list[Row]) -> str:
    """Return the column of the table: "1.18 holds", "1.12 fails" or a dash."""
    most, held = asked(row, rows), holds(row, rows)
    return "-" if most is None else f"{most:.2f} {'holds' if held else 'fails'}"


def summary(rows: list[Row]) -> list[str]:
    """Return how many of what is asked hold, which do not, and the same of every row_norm."""
    judged = [(row, holds(row, rows)) for row in rows]
    failed = [row for row, held in judged if held is False]
    count = sum(held is not None for _, held in judged)
    names = "; ".join(
        f"{row['layer']} {row['K']}x{row['N']} {row['ratio']:.2f} for {cell(row, rows)}" for row in failed
    )
    shown = [f"asked of {count} layers, holds for {count - len(failed)}" + (f"; not: {names}" if names else "")]
    norms = {
        (row["layer"], row["K"], row["N"]): (kernel["us"], kernel["bytes_us"])
        for row in rows
        for kernel in row["kernels"]
        if kernel["kernel"] == "row_norm"
    }
    for (layer, K, N), (us, least) in norms.items():
        held = "holds" if us <= ROW_NORM * least else "fails"
        shown.append(f"row_norm of {layer} {K}x{N}: {us:.1f} µs, {us / least:.1f} times its bytes ({ROW_NORM} {held})")
    return shown
