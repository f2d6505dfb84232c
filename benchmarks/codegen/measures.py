"""What the disassembly of a launched binary says of its speed: one row for each."""

from typing import Any, NamedTuple

from benchmarks.codegen import device, sass
from benchmarks.codegen.compiling import Compiled
from benchmarks.codegen.recording import Launch
from benchmarks.codegen.warp import Walk, Warp


class Body(NamedTuple):
    """A binary's code, read.

    Args:
        code: Its instructions.
        main: (first, last) of the main loop, in which most of the large tensors is read or written;
            None: no loop does.
        origins: Index of each load and store → the operand that it reads or writes.
    """

    code: list[sass.Instruction]
    main: tuple[int, int] | None
    origins: dict[int, str | None]

    @property
    def step(self) -> range:
        """Indices of one turn of the main loop; without one, of all."""
        return range(len(self.code)) if self.main is None else range(self.main[0], self.main[1] + 1)


def body_of(launch: Launch, compiled: Compiled, least: int | None = None) -> Body:
    """Read the code, and find the loop in which the kernel spends its time: where it reads or
    writes tensors of `least` bytes, by default those that come from device memory, or the largest.
    """
    code, sizes = sass.parse(compiled.sass), _sizes(launch)
    names = sass.pointers(launch.binary.signature)
    at = [i for i, instruction in enumerate(code) if instruction.loads or instruction.base == "STG"]
    origins = {i: sass.origin(code, i, names) for i in at}
    sized = {i: sizes.get(origins[i] or "", 0) for i in at}
    if least is None:
        least = min(device.LARGE, max(sized.values(), default=0))
    main, most = None, (0, 0)
    for loop in sorted(sass.loops(code), key=lambda loop: (loop[1] - loop[0], loop)):
        inside = [i for i, size in sized.items() if loop[0] <= i <= loop[1] and size >= max(1, least)]
        reads = sum(code[i].width for i in inside if code[i].loads)
        moved = (reads, 0) if reads else (0, sum(code[i].width for i in inside))
        first = main is not None and moved == most and loop[1] < main[0]  # the second reads the cache
        if moved > most or first:
            main, most = loop, moved
    return Body(code, main, origins)


def _sizes(launch: Launch) -> dict[str, int]:
    return {operand.name: operand.bytes for operand in launch.operands}


def walk_of(launch: Launch, compiled: Compiled, body: Body) -> Walk:
    """Let a warp walk it, while as many programs as fit share the device."""
    sharing = running(launch, compiled) * min(launch.programs, device.SMS)
    return Warp(body.code, body.main, large(launch, compiled, body), compiled.threads // 32, sharing).run()


def running(launch: Launch, compiled: Compiled) -> int:
    """Return how many programs a multiprocessor runs at a time: what fits, if there are as many."""
    fit = device.blocks_by(compiled.registers, compiled.shared_bytes, compiled.threads)
    return min(*fit.values(), -(-launch.programs // device.SMS))


def large(launch: Launch, compiled: Compiled, body: Body) -> dict[int, int]:
    """Return the index of every load from and store to device memory → its bytes for the whole
    program.
    """
    sizes, code = _sizes(launch), body.code
    here = {body.origins[i] for i in body.origins if code[i].loads and i in body.step}
    return {
        i: code[i].width * compiled.threads
        for i, name in body.origins.items()
        if sizes.get(name or "", 0) >= device.LARGE
        # what the main loop has read is in the cache for those after it
        and not (code[i].loads and body.main is not None and i > body.main[1] and name in here)
    }


def measured(launch: Launch, compiled: Compiled) -> dict[str, Any]:
    """Return the row of one launched binary."""
    body = body_of(launch, compiled)
    walk, sizes, code = walk_of(launch, compiled, body), _sizes(launch), body.code
    by = device.blocks_by(compiled.registers, compiled.shared_bytes, compiled.threads)
    step = [code[i] for i in body.step]
    moving = large(launch, compiled, body)
    moved = sum(size for i, size in moving.items() if i in body.step)
    widths = {operand.name: _WIDTHS.get(operand.dtype, 4) for operand in launch.operands}
    matrices = [i for i in body.step if code[i].loads and sizes.get(body.origins[i] or "", 0) >= device.MATRIX]
    return {
        "kernel": launch.binary.kernel.removesuffix("_kernel"),
        "key": launch.binary.key,
        "config": launch.binary.says,
        "grid": launch.grid,
        "programs": launch.programs,
        "R": launch.integers.get("R", 0),
        "narrow": all(operand.dtype != "float32" for operand in launch.operands if operand.name in _FACTORS),
        "large_reads": any(code[i].loads for i in moving),
        "large_writes": any(code[i].base == "STG" for i in moving),
        "registers": compiled.registers,
        "spill_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "threads": compiled.threads,
        "ctas_by": by,
        "ctas_per_sm": min(by.values()),
        "ctas_running": running(launch, compiled),
        "serialized_mma": compiled.serialized,
        "mma": _products(step) or _products(code),
        "in_flight_bytes": walk.in_flight * running(launch, compiled),
        "barriers_per_step": _count(step, "BAR"),
        "shuffles_per_step": _count(step, "SHFL"),
        "scalar_loads": sum(code[i].width <= widths.get(body.origins[i] or "", 0) for i in matrices),
        "not_ahead": sorted({body.origins[i] or "?" for i in matrices if i in walk.same_step}),
        "instructions_per_step": len(step),
        "instructions_per_kb": 1024 * len(step) * (compiled.threads // 32) / moved if moved else None,
        "loop": body.main is not None,
        "cycles_per_step": round(walk.step),
    }


_FACTORS = ("X", "DY", "W", "S", "A", "B", "H")
"""Operands of products: where none is float32, products are on 16-bit units."""
_WIDTHS = {"bfloat16": 2, "float16": 2, "float32": 4, "bool": 1, "int64": 8}


def _count(code: list[sass.Instruction], base: str) -> int:
    return sum(instruction.base == base for instruction in code)


def _products(code: list[sass.Instruction]) -> dict[str, int]:
    """Return how often each matrix instruction occurs, by its name up to the shape."""
    found: dict[str, int] = {}
    for instruction in code:
        if instruction.base in ("HGMMA", "HMMA", "QGMMA", "DMMA", "IMMA"):
            name = ".".join(instruction.name.split(".")[:2])
            found[name] = found.get(name, 0) + 1
    return found
