"""What the device itself can do, measured in the run that is compared with it: a copy, a GEMM of
each dtype.
"""

import torch

from benchmarks.timing import Budget, Clock, interleaved

COPY_BYTES = {"cpu": 2**27, "cuda": 2**30}
GEMM_SIZE = {"cpu": 768, "cuda": 8192}
BUDGET = Budget(seconds=1.0, least=5, most=20)
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


def copy_tbps(device: str, clock: Clock) -> float:
    """Terabytes per second of a copy far larger than the caches, reads and writes both counted."""
    kind = torch.device(device).type
    source = torch.zeros(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    times = interleaved({"copy": lambda: target.copy_(source)}, clock, BUDGET)
    return 2 * source.nbytes / times["copy"].median_ms / 1e9


def gemm_tflops(device: str, clock: Clock, dtypes: tuple[str, ...], size: int | None = None) -> dict[str, float]:
    """Dtype → TFLOP/s of a square GEMM of random numbers (zeros draw less power, and boost higher).

    Args:
        device: Where.
        clock: Of the device.
        dtypes: Keys of DTYPES.
        size: Of each side; None: GEMM_SIZE.
    """
    n = size or GEMM_SIZE[torch.device(device).type]
    passes = {}
    for name in dtypes:
        x, W = (torch.randn(n, n, device=device).to(DTYPES[name]) for _ in range(2))
        passes[name] = lambda x=x, W=W: x @ W
    return {name: 2 * n**3 / times.median_ms / 1e9 for name, times in interleaved(passes, clock, BUDGET).items()}


def half_precision(device: str, clock: Clock) -> str:
    """Return the dtype people train in on this device: bf16 where its GEMM is faster than fp32's,
    else fp32.

    dx = dy W is what is timed: some CPUs have a fast x Wᵀ in bf16 and emulate the other.
    """
    if device.startswith("cuda"):
        return "bf16" if torch.cuda.get_device_capability(device) >= (8, 0) else "fp16"
    dy, W = torch.randn(128, 512), torch.randn(512, 512)
    narrow = [tensor.bfloat16() for tensor in (dy, W)]
    passes = {"fp32": lambda: dy @ W, "bf16": lambda: narrow[0] @ narrow[1]}
    times = interleaved(passes, clock, Budget(seconds=0.5, least=3, most=9, warmup=1))
    return "bf16" if times["bf16"].median_ms < times["fp32"].median_ms else "fp32"
