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


def body_of(launch: Launch, compiled: Compiled) -> Body:
    """Read the code, and find the loop in which the kernel spends its time."""
    code, sizes = sass.parse(compiled.sass), _sizes(launch)
    names = sass.pointers(launch.binary.signature)
    at = [i for i, instruction in enumerate(code) if instruction.loads or instruction.base == "STG"]
    origins = {i: sass.origin(code, i, names) for i in at}
    sized = {i: sizes.get(origins[i] or "", 0) for i in at}
    least = device.LARGE if max(sized.values(), default=0) >= device.LARGE else max(sized.values(), default=0)
    main, most = None, 0
    for loop in sass.loops(code):  # of two with the same accesses, the inner one
        inside = [i for i, size in sized.items() if loop[0] <= i <= loop[1] and size >= max(1, least)]
        moved = sum(code[i].width for i in inside)
        if moved > most:
            main, most = loop, moved
    return Body(code, main, origins)


def _sizes(launch: Launch) -> dict[str, int]:
    return {operand.name: operand.bytes for operand in launch.operands}


def walk_of(launch: Launch, compiled: Compiled, body: Body) -> Walk:
    """Let a warp walk it."""
    return Warp(
        body.code, body.main, large_loads(launch, compiled, body), compiled.threads // 32, launch.programs
    ).run()


def large_loads(launch: Launch, compiled: Compiled, body: Body) -> dict[int, int]:
    """Return the index of every load from device memory → its bytes for the whole program."""
    sizes = _sizes(launch)
    return {
        i: body.code[i].width * compiled.threads
        for i, name in body.origins.items()
        if body.code[i].loads and sizes.get(name or "", 0) >= device.LARGE
    }


def measured(launch: Launch, compiled: Compiled) -> dict[str, Any]:
    """Return the row of one launched binary."""
    body = body_of(launch, compiled)
    walk, sizes, code = walk_of(launch, compiled, body), _sizes(launch), body.code
    by = device.blocks_by(compiled.registers, compiled.shared_bytes, compiled.threads)
    blocks = min(by.values())
    running = min(blocks, -(-launch.programs // device.SMS))
    step = [code[i] for i in body.step]
    large = large_loads(launch, compiled, body)
    moved = sum(size for i, size in large.items() if i in body.step) + sum(
        code[i].width * compiled.threads
        for i in body.step
        if code[i].base == "STG" and sizes.get(body.origins[i] or "", 0) >= device.LARGE
    )
    widths = {operand.name: _WIDTHS.get(operand.dtype, 4) for operand in launch.operands}
    matrices = [i for i in body.step if code[i].loads and sizes.get(body.origins[i] or "", 0) >= device.MATRIX]
    return {
        "kernel": launch.binary.kernel.removesuffix("_kernel"),
        "key": launch.binary.key,
        "config": launch.binary.says,
        "grid": launch.grid,
        "registers": compiled.registers,
        "spill_bytes": compiled.stack_bytes,
        "shared_bytes": compiled.shared_bytes,
        "threads": compiled.threads,
        "ctas_by": by,
        "ctas_per_sm": blocks,
        "ctas_running": running,
        "serialized_mma": compiled.serialized,
        "mma": _products(step) or _products(code),
        "in_flight_bytes": walk.in_flight * running,
        "barriers_per_step": _count(step, "BAR"),
        "shuffles_per_step": _count(step, "SHFL"),
        "scalar_loads": sum(code[i].width <= widths.get(body.origins[i] or "", 0) for i in matrices),
        "not_ahead": sorted({body.origins[i] or "?" for i in matrices if i in walk.same_step}),
        "instructions_per_step": len(step),
        "instructions_per_kb": 1024 * len(step) * (compiled.threads // 32) / moved if moved else None,
        "loop": body.main is not None,
        "cycles_per_step": round(walk.step),
    }


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
