"""Launched binaries that are beyond a limit of limits.py: (kernel, layer, measures, (estimated µs,
what their bytes alone would take)).

Printed by `python -m benchmarks.codegen --launched`; a line goes when its kernel is mended.
"""

from benchmarks.codegen.limits import Allowed

_LINES: list[tuple[str, str, str, tuple[float, float]]] = [
    ("finish_dy", "dora r=32 4096x4096", "in_flight, scalar_loads", (37.4, 16.4)),
    ("times_small", "dora r=64 4096x4096", "in_flight", (50.1, 16.8)),
    ("finish_dy", "dora r=24 4096x4096", "scalar_loads", (23.2, 12.3)),
    ("times_small", "goat E=8 r=2 4096x4096", "in_flight", (67.9, 16.3)),
    ("reflect_sums", "ether-plus-both 4096x14336", "scalar_loads", (121.2, 109.4)),
    ("token_sums", "lora r=16 dropout 4096x4096", "serialized", (30.0, 15.9)),
    ("times_small", "lora r=64 dropout 4096x4096", "serialized, in_flight", (29.3, 16.7)),
    ("token_sums", "lora r=64 dropout 4096x4096", "serialized", (31.3, 16.8)),
    ("times_small", "lora r=64 bf16-fp32 4096x4096", "in_flight", (55.7, 16.8)),
    ("row_norm", "dora r=16 bf16-fp32 4096x4096", "in_flight", (17.5, 7.9)),
    ("row_norm", "dora r=32 4096x4096", "in_flight, programs", (15.1, 7.9)),
    ("row_norm", "dora r=64 4096x4096", "in_flight, programs, matrix", (20.9, 8.1)),
    ("row_norm", "dora r=24 4096x4096", "in_flight, programs", (15.0, 7.9)),
    ("row_norm", "dora r=64 bf16-fp32 4096x4096", "in_flight, programs", (45.6, 8.3)),
    ("grouped_sums", "grouped-lora E=128 r=64 dropout 2048x1536", "serialized, in_flight", (126.5, 49.7)),
]

EXCEPTIONS = [Allowed(*line) for line in _LINES]
