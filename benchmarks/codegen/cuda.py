"""What the disassembly of a kernel of csrc/ says of its speed, by the measures of Triton's.

    speeds(Path("times_small.cubin"), names)     name → blocks, bytes in flight, ...

No launch stands behind it, so that sizes of operands are not known, nor which of two paths is
taken: the main loop is the innermost one that copies to shared memory and meets at a barrier, or
where none does the one that loads most. Of its turn counts what is in no loop inside, which is
where rows are brought that can't be read 16 bytes at a time.
"""

import re
import subprocess
from collections.abc import Collection
from pathlib import Path

from benchmarks.codegen import device, sass
from benchmarks.codegen.compiling import TOOLS
from benchmarks.codegen.warp import numbers

THREADS = 128
"""Of a block: csrc/launch.cuh."""
_USAGE = re.compile(r"Function (\S+?):\s+REG:(\d+) STACK:\d+ SHARED:(\d+)")


def speeds(cubin: Path, wanted: Collection[str]) -> dict[str, dict[str, int]]:
    """Return, for each of these kernels of a file: blocks that fit a multiprocessor; bytes that all
    of them have in flight there; in a turn of the main loop loads of 2 or 4 bytes, barriers, matrix
    instructions, instructions.
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
    loops = sass.loops(code)
    bases = {loop: {code[i].base for i in range(loop[0], loop[1] + 1)} for loop in loops}
    main = next((loop for loop in loops if {"LDGSTS", "BAR"} <= bases[loop]), None)
    if main is None:
        loads = {loop: sum(code[i].width for i in range(loop[0], loop[1] + 1) if code[i].loads) for loop in loops}
        main = max(loops, key=lambda loop: loads[loop], default=(0, len(code) - 1))
    turn = set(range(main[0], main[1] + 1))
    inside = {i for loop in loops if set(range(loop[0], loop[1] + 1)) < turn for i in range(loop[0], loop[1] + 1)}
    own = [code[i] for i in sorted(turn - inside)]
    copies = [each for each in own if each.base == "LDGSTS"]
    ahead = max((numbers(each, "SB")[1] for each in own if each.base == "DEPBAR"), default=0) if copies else 0
    wide = copies or [each for each in own if each.loads and each.width == 16]
    blocks = min(device.blocks_by(registers, shared, THREADS).values())
    return {
        "blocks": blocks,
        "in_flight": (ahead + 1) * sum(each.width for each in wide) * THREADS * blocks,
        "single": sum(each.loads and each.width <= 4 for each in own),
        "barriers": sum(each.base == "BAR" for each in own),
        "products": sum(code[i].base == "HMMA" for i in turn),
        "turn": len(own),
    }
