"""What the disassembly of a kernel of csrc/ says of its speed, by the measures of Triton's.

    speeds(Path("times_small.cubin"), names)     name → blocks, bytes in flight, ...

No launch stands behind it, so that sizes of operands are not known: the main loop is the one that
loads most bytes for each thread, and what comes from device memory are its asynchronous copies, or
where it has none its loads of 16 bytes.
"""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from benchmarks.codegen import device, sass
from benchmarks.codegen.compiling import TOOLS
from benchmarks.codegen.warp import Warp

THREADS = 128
"""Of a block: csrc/launch.cuh."""
_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)")


def speeds(cubin: Path, wanted: Collection[str]) -> dict[str, dict[str, int]]:
    """Return, for each of these kernels of a file: blocks that fit a multiprocessor; bytes that all
    of them have in flight there; in a turn of the main loop loads of 2 or 4 bytes, barriers, matrix
    instructions, instructions on every path.
    """
    said = {
        option: subprocess.run([TOOLS / "cuobjdump", option, cubin], capture_output=True, text=True, check=True).stdout
        for option in ("-res-usage", "-sass")
    }
    usage = {name: (int(registers), int(shared)) for name, registers, shared in _USAGE.findall(said["-res-usage"])}
    found = {}
    for part in said["-sass"].split("Function : ")[1:]:
        name = part.split("\n", 1)[0].strip()
        if name in wanted:
            found[name] = speed_of(sass.parse(part), *usage[name])
    return found


def speed_of(code: list[sass.Instruction], registers: int, shared: int) -> dict[str, int]:
    """Return them of one kernel's code."""
    main, most = None, 0
    for loop in sass.loops(code):
        moved = sum(code[i].width for i in range(loop[0], loop[1] + 1) if code[i].loads)
        if moved > most:
            main, most = loop, moved
    turn = range(len(code)) if main is None else range(main[0], main[1] + 1)
    copies = [i for i in turn if code[i].base == "LDGSTS"] or [i for i in turn if code[i].loads and code[i].width == 16]
    blocks = min(device.blocks_by(registers, shared, THREADS).values())
    walk = Warp(code, main, {i: code[i].width * THREADS for i in copies}, THREADS // 32, blocks * device.SMS).run()
    return {
        "blocks": blocks,
        "in_flight": walk.in_flight * blocks,
        "single": sum(code[i].loads and code[i].width <= 4 for i in turn),
        "barriers": sum(code[i].base == "BAR" for i in turn),
        "products": sum(code[i].base == "HMMA" for i in turn),
        "turn": len(turn),
    }
