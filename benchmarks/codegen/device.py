"""The H200 that binaries are looked at for: what it has, and how long things take there. No number
here was measured by us; each has its source.
"""

SMS = 132
BANDWIDTH = 4.8e12
"""Bytes a second of device memory, by NVIDIA's datasheet of the H200."""
COPY = 4.3e12
"""Bytes a second, reads and writes together, that a large copy reached on one H200."""
GEMM = 2 * 8192 * 4096 * 4096 / 348e-6
"""FLOP a second of the library's bfloat16 GEMM on one H200, random data: 348 µs at T=8192, 4096².
"""
ADDING = 15e-6 / (8192 * 4096)
"""Seconds more for each element of the output where a GEMM adds to it (beta = 1): a guess, 15 µs at
T=8192, N=4096."""
CLOCK = 1.83e9
"""Cycles a second: 989 TFLOP/s of dense bfloat16 (the datasheet's) over 132 · 4096 FLOP a cycle."""
LATENCY = 0.7e-6
"""Seconds from a load's issue to its data from device memory while the memory is busy."""
CACHED = 270
"""Cycles of a load that the L2 cache has: Luo et al., arXiv 2402.13499 (about 262 to 273)."""
LAUNCH = 1.5e-6
"""Seconds between the end of one kernel and the start of the next in a stream."""

REGISTERS, SHARED, THREADS, BLOCKS = 65536, 228 * 1024, 2048, 32
"""What one multiprocessor has: registers, bytes of shared memory (of which each program takes 1 KB
more than it asks for), threads, programs. CUDA C++ Programming Guide, compute capability 9.0."""
LARGE = 24 << 20
"""Bytes from which a tensor is taken to come from device memory: half of the L2 cache. What is
smaller is small (a factor) or was written by the launch before (parts)."""
MATRIX = 64 << 10
"""Bytes from which a tensor counts as a matrix: its loads should be wide and issued ahead."""

NEEDED = BANDWIDTH * LATENCY / SMS
"""Bytes in flight that a multiprocessor needs to keep device memory busy: about 25 KB."""


def blocks_by(registers: int, shared: int, threads: int) -> dict[str, int]:
    """Return how many programs fit one multiprocessor by each of its resources."""
    of_thread = -(-registers // 8) * 8
    return {
        "registers": REGISTERS // max(1, of_thread * threads),
        "shared": SHARED // (shared + 1024),
        "threads": min(BLOCKS, THREADS // threads),
    }
