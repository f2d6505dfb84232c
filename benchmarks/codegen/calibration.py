"""The estimate held against figures that others published, on kernels written here for that:
`python -m benchmarks.codegen.calibration`.

The constants of device.py were fixed before, and nothing was fitted to these. The published figures
are of other code of the same form, and of the tiles that it is known for.
"""

import sys
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from benchmarks.codegen.compiling import compiled
from benchmarks.codegen.estimate import kernel_of
from benchmarks.codegen.recording import recording


@triton.jit
def compose_kernel(BASE, LORA, G, OUT, elements, columns, scale, BLOCK: tl.constexpr):
    """out = (g - 1) · base + g · scale · lora, elementwise."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < elements
    base = tl.load(BASE + i, inside, 0.0).to(tl.float32)
    lora = tl.load(LORA + i, inside, 0.0).to(tl.float32)
    g = tl.load(G + i % columns, inside, 0.0).to(tl.float32)
    tl.store(OUT + i, ((g - 1) * base + g * scale * lora).to(OUT.dtype.element_ty), inside)


@triton.jit
def matmul_kernel(
    A, B, C, M, N, K, stride_am, stride_bk, stride_cm,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Multiply: a tile of C = A B by pointers, tiles in groups of GROUP rows."""
    rows, columns = tl.cdiv(M, BM), tl.cdiv(N, BN)
    first = tl.program_id(0) // (GROUP * columns) * GROUP
    size = tl.minimum(rows - first, GROUP)
    m = (first + tl.program_id(0) % (GROUP * columns) % size) * BM + tl.arange(0, BM)
    n = tl.program_id(0) % (GROUP * columns) // size * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k0 in range(0, K, BK):
        k = k0 + tl.arange(0, BK)
        a = tl.load(A + m[:, None] * stride_am + k[None, :], k[None, :] < K, 0.0)
        b = tl.load(B + k[:, None] * stride_bk + n[None, :], k[:, None] < K, 0.0)
        acc = tl.dot(a, b, acc)
    at = C + m[:, None] * stride_cm + n[None, :]
    tl.store(at, acc.to(C.dtype.element_ty), (m[:, None] < M) & (n[None, :] < N))


class Figure(NamedTuple):
    """A published figure: what of, microseconds, where; how to launch ours, turns of its loop."""

    of: str
    microseconds: float
    source: str
    launch: Callable[[], None]
    turns: float | None


def _compose(M: int, N: int) -> None:
    base, lora, out = (torch.empty(M, N, dtype=torch.bfloat16) for _ in range(3))
    g = torch.empty(N, dtype=torch.bfloat16)
    compose_kernel[(M * N // 1024,)](base, lora, g, out, M * N, N, 0.5, BLOCK=1024, num_warps=4)


def _matmul(M: int, N: int, K: int) -> None:
    A, B, C = (torch.empty(*shape, dtype=torch.float16) for shape in ((M, K), (K, N), (M, N)))
    tiles = {"BM": 128, "BN": 256, "BK": 64, "GROUP": 8, "num_warps": 8, "num_stages": 3}
    grid = (-(-M // 128) * -(-N // 256),)
    matmul_kernel[grid](A, B, C, M, N, K, K, N, N, **tiles)


def _figures() -> list[Figure]:
    tutorial = "triton-lang/triton, pull request 5726: matmul_kernel of tutorial 09, H100"
    autotuned = 2e-6 * 3072**3 / 524.74
    return [
        Figure(
            "elementwise, 3 tensors of 8192² bf16", 122, "arXiv 2603.22276, its records: H200",
            lambda: _compose(8192, 8192), None,
        ),
        Figure("GEMM 8192 x 8192 x 512 fp16", 315.9, tutorial, lambda: _matmul(8192, 8192, 512), 512 / 64),
        Figure(
            "GEMM 3072³ fp16", autotuned, "triton-lang/triton, issue 3672: tutorial 03, autotuned, H100",
            lambda: _matmul(3072, 3072, 3072), 3072 / 64,
        ),
    ]  # fmt: skip


def main() -> int:
    """Estimate, and print each beside what was published."""
    print("| kernel | estimated µs | limit | published µs | estimate / published | source |")
    print("| --- | ---: | --- | ---: | ---: | --- |")
    for figure in _figures():
        with recording() as seen:
            figure.launch()
        (launch,) = seen.launches
        found = kernel_of(launch, compiled(launch.binary), figure.turns)
        print(
            f"| {figure.of} | {found.total:.0f} | {found.limit} | {figure.microseconds:.0f} "
            f"| {found.total / figure.microseconds:.2f} | {figure.source} |"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
