"""Launched binaries that are beyond a limit of limits.py: (kernel, layer, measures, (estimated µs,
what their bytes alone would take), why).

Printed by `python -m benchmarks.codegen --launched`, the reason added by hand; a line goes when its
kernel is mended.
"""

from benchmarks.codegen.limits import Allowed

_LOW = (
    "half as many rows a program would read Â from the cache twice as often; 128 programs leave 3 % of the device idle"
)

_LINES: list[tuple[str, str, str, tuple[float, float], str]] = [
    ("row_norm", "dora r=24 4096x4096", "programs", (10.4, 7.9), _LOW),
    ("row_norm", "dora r=32 4096x4096", "programs", (10.4, 7.9), _LOW),
    ("row_norm", "dora r=64 4096x4096", "programs, matrix", (10.6, 8.1), f"{_LOW}; 32 rows are too few for wgmma"),
    (
        *("row_norm", "dora r=64 bf16-fp32 4096x4096", "in_flight, programs", (38.5, 8.3)),
        "three tf32 products for a float32 norm take 27 µs: no load is waited for",
    ),
    (
        *("reflect_sums", "ether-plus-both 4096x14336", "scalar_loads", (121.2, 109.4)),
        "a tile's 64 numbers of a and b are fewer than its threads: each loads one",
    ),
]

EXCEPTIONS = [Allowed(*line) for line in _LINES]
