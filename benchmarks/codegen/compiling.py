"""Compile recorded binaries for a GPU that is not here, each once, on all cores, and disassemble
them.
"""

import os
import re
import subprocess
import tempfile
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import triton
from triton.backends.compiler import GPUTarget

from benchmarks.codegen.recording import Binary

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


class Compiled(NamedTuple):
    """What the assembler made of a binary.

    Args:
        registers: Of a thread.
        stack_bytes: Of a thread: where spilled registers go.
        shared_bytes, threads: Of a program.
        serialized: Lines in which the assembler warns that matrix instructions wait one by one.
        sass: The disassembly, with the encoding of each instruction.
        seconds: That it took.
    """

    registers: int
    stack_bytes: int
    shared_bytes: int
    threads: int
    serialized: int
    sass: str
    seconds: float


def compiled(binary: Binary, capability: int = 90) -> Compiled:
    """Compile one binary in this process."""
    start = time.perf_counter()
    made = triton.compile(binary.source(), target=GPUTarget("cuda", capability, 32), options=binary.options)
    with tempfile.TemporaryDirectory() as folder:
        ptx, cubin = Path(folder, "kernel.ptx"), Path(folder, "kernel.cubin")
        ptx.write_text(made.asm["ptx"])
        cubin.write_bytes(made.asm["cubin"])
        arch = re.search(r"^\.target (sm_\w+)", made.asm["ptx"], re.MULTILINE)
        said = _run("ptxas", "-v", f"--gpu-name={arch.group(1)}", ptx, "-o", os.devnull)  # type: ignore[union-attr]
        usage, sass = _run("cuobjdump", "-res-usage", cubin), _run("cuobjdump", "-sass", cubin)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    threads = 32 * made.metadata.num_warps
    took = time.perf_counter() - start
    serialized = len(re.findall("serializ", said))
    return Compiled(int(registers), int(stack), made.metadata.shared, threads, serialized, sass, took)


def _run(tool: str, *arguments: object) -> str:
    done = subprocess.run([TOOLS / tool, *map(str, arguments)], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr


def compiled_all(binaries: Iterable[Binary], workers: int | None = None) -> dict[str, Compiled]:
    """Compile every binary → by its key; in as many processes as there are cores, or `workers`."""
    wanted = {binary.key: binary for binary in binaries}
    if workers == 1 or len(wanted) < 3:
        return {key: compiled(binary) for key, binary in wanted.items()}
    with ProcessPoolExecutor(workers or len(os.sched_getaffinity(0))) as pool:
        return dict(zip(wanted, pool.map(compiled, wanted.values()), strict=True))


def cached(binary: Binary, capability: int = 90) -> float:
    """Compile one binary into Triton's cache on the disk → the seconds of a core that it took, in
    this process and the assembler's.
    """
    start = _worked()
    triton.compile(binary.source(), target=GPUTarget("cuda", capability, 32), options=binary.options)
    return _worked() - start


def _worked() -> float:
    return sum(getattr(os.times(), name) for name in ("user", "system", "children_user", "children_system"))
