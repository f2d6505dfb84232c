"""What the disassembly of a launched binary must show, by class of kernel, and the exceptions: each
a line with what was measured and estimated when it was made.

`python -m benchmarks.codegen --launched` fails beyond them; it prints the lines of what is new, and
names the exceptions that nothing needs any more.
"""

from typing import Any, NamedTuple

from benchmarks.codegen import device

Row = dict[str, Any]


class Limits(NamedTuple):
    """Of one class of kernels; None: no limit.

    Args:
        in_flight: At least so many bytes from device memory on their way on a multiprocessor.
        ctas: At least so many programs on a multiprocessor, ...
        alone: ... or one of 8 warps and so many bytes in flight.
        scalar_loads: At most so many loads of one element of a matrix in a turn of the main loop.
        barriers: At most so many in a turn of the main loop.
        programs: At least so many where the operands are those of a 4096 x 4096 layer.
        matrix: mma.sync on 16-bit operands only where it takes less than this part of the time that
            the kernel's bytes take.
    """

    in_flight: int | None = None
    ctas: int | None = None
    alone: int | None = None
    scalar_loads: int | None = None
    barriers: int | None = None
    programs: int | None = None
    matrix: float | None = None


READS = Limits(in_flight=25 << 10, ctas=2, alone=32 << 10, scalar_loads=0, matrix=0.5)
"""Kernels that read a tensor from device memory, at ranks up to RANKS: about device.NEEDED bytes
keep it busy."""
CLASSES: dict[str, Limits] = {
    "row_norm": READS._replace(barriers=3, programs=device.SMS),
    "reads": READS,
    "writes": Limits(ctas=2, scalar_loads=0),
    "small": Limits(),
}
"""Class → limits: a kernel's own name, or what it does with tensors in device memory."""
RANKS = 64
"""Total ranks up to which the limits of CLASSES hold; what always holds is in `beyond`."""


class Allowed(NamedTuple):
    """A binary that is let through beyond a limit.

    Args:
        kernel, of: Its row.
        measures: What is beyond its limit, as `beyond` names it, with commas.
        microseconds: Estimated, and what its bytes alone would take.
        why: What keeps it there.
    """

    kernel: str
    of: str
    measures: str
    microseconds: tuple[float, float]
    why: str = ""


def class_of(row: Row) -> str:
    """Return the key of CLASSES."""
    if row["kernel"] in CLASSES:
        return str(row["kernel"])
    return "reads" if row["large_reads"] else "writes" if row["large_writes"] else "small"


def beyond(row: Row) -> dict[str, str]:
    """Return measure → what it is and should be, of all that is beyond its limit."""
    found = {}
    if row["spill_bytes"]:
        found["spills"] = f"{row['spill_bytes']} bytes, not 0"
    if row["serialized_mma"]:
        found["serialized"] = "the assembler serialised its matrix instructions"
    if row["R"] > RANKS:
        return found
    limits, flight, ctas = CLASSES[class_of(row)], row["in_flight_bytes"], row["ctas_per_sm"]
    if limits.in_flight is not None and flight < limits.in_flight:
        found["in_flight"] = f"{flight / 1024:.1f} KB, not {limits.in_flight / 1024:.0f}"
    alone = limits.alone is not None and row["threads"] >= 256 and flight >= limits.alone
    if limits.ctas is not None and ctas < limits.ctas and not alone:
        found["ctas"] = f"{ctas} programs a multiprocessor, not {limits.ctas}"
    if limits.scalar_loads is not None and row["scalar_loads"] > limits.scalar_loads:
        found["scalar_loads"] = f"{row['scalar_loads']} a turn"
    if limits.barriers is not None and row["barriers_per_step"] > limits.barriers:
        found["barriers"] = f"{row['barriers_per_step']} a turn, not {limits.barriers}"
    if limits.programs is not None and row["programs"] < limits.programs:
        found["programs"] = f"{row['programs']}, not {limits.programs}"
    slow = any(name.startswith("HMMA") for name in row["mma"]) and row["narrow"]
    if limits.matrix is not None and slow and row["matrix_us"] > limits.matrix * row["bytes_us"]:
        found["matrix"] = f"mma.sync takes {row['matrix_us']:.0f} µs, its bytes {row['bytes_us']:.0f}"
    return found


def judged(rows: list[Row], exceptions: list[Allowed], complete: bool = False) -> tuple[list[Allowed], list[Allowed]]:
    """Return what is beyond a limit and no exception, as the exceptions that would let it through;
    and the exceptions of these rows that nothing needs, or where the rows are `complete`, of any.
    """
    new, needed = [], set()
    for row in rows:
        allowed = [each for each in exceptions if (each.kernel, each.of) == (row["kernel"], row["of"])]
        words = {word for each in allowed for word in each.measures.split(", ")}
        found = beyond(row)
        needed |= {each for each in allowed if set(each.measures.split(", ")) & set(found)}
        left = [name for name in found if name not in words]
        if left:
            times = round(row["estimate_us"], 1), round(row["bytes_us"], 1)
            new.append(Allowed(row["kernel"], row["of"], ", ".join(left), times))
    seen = {(row["kernel"], row["of"]) for row in rows}
    return new, [each for each in exceptions if each not in needed and (complete or (each.kernel, each.of) in seen)]
