"""The estimate held against figures that others published, on kernels written here for that:
`python -m benchmarks.codegen.calibration`.

The constants of device.py were fixed before, and nothing was fitted to these. The published figures
are of other code of the same form, and of the tiles that it is known for. A card that is no H200
has the bandwidth of its datasheet; a copy reaches the same part of it.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import NamedTuple
from unittest.mock import patch

import torch
import triton
import triton.language as tl

from benchmarks.codegen import device
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


@triton.jit
def layer_norm_kernel(X, WEIGHT, BIAS, Y, MEAN, INVERSE, columns, stride, eps, BLOCK: tl.constexpr):
    """Normalise a row, held whole: y = (x - mean) / sqrt(variance + eps) · weight + bias."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + c, c < columns, 0.0).to(tl.float32)
    mean = tl.sum(x, 0) / columns
    off = tl.where(c < columns, x - mean, 0.0)
    inverse = 1 / tl.sqrt(tl.sum(off * off, 0) / columns + eps)
    tl.store(MEAN + row, mean)
    tl.store(INVERSE + row, inverse)
    weight, bias = tl.load(WEIGHT + c, c < columns, 0.0), tl.load(BIAS + c, c < columns, 0.0)
    y = off * inverse * weight.to(tl.float32) + bias.to(tl.float32)
    tl.store(Y + row * stride + c, y.to(Y.dtype.element_ty), c < columns)


@triton.jit
def rms_norm_kernel(X, WEIGHT, Y, INVERSE, columns, stride, eps, BLOCK: tl.constexpr):
    """Normalise without mean and bias: y = x / sqrt(mean of squares + eps) · weight."""
    row, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    x = tl.load(X + row * stride + c, c < columns, 0.0).to(tl.float32)
    inverse = 1 / tl.sqrt(tl.sum(x * x, 0) / columns + eps)
    tl.store(INVERSE + row, inverse)
    y = (x * inverse).to(Y.dtype.element_ty) * tl.load(WEIGHT + c, c < columns, 0.0)
    tl.store(Y + row * stride + c, y, c < columns)


CARDS = {"H200": device.BANDWIDTH, "H100": 3.35e12, "H100 NVL": 3.9e12}
"""Bytes a second of device memory, by NVIDIA's datasheets."""


class Figure(NamedTuple):
    """A published figure: what of, microseconds, on which card, where; how to launch ours, turns of
    its loop.
    """

    of: str
    microseconds: float
    card: str
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


def _norm(rows: int, columns: int, dtype: torch.dtype, rms: bool) -> None:
    x, y = (torch.empty(rows, columns, dtype=dtype) for _ in range(2))
    weight, bias = (torch.empty(columns, dtype=dtype) for _ in range(2))
    mean, inverse = (torch.empty(rows, dtype=torch.float32 if rms else dtype) for _ in range(2))
    block = 1 << (columns - 1).bit_length()
    # as many warps as Liger gives a row of this width
    warps = 32 if block >= 32768 else 16 if block >= 8192 else 8 if block >= 2048 else 4
    if rms:
        rms_norm_kernel[(rows,)](x, weight, y, inverse, columns, columns, 1e-6, BLOCK=block, num_warps=warps)
    else:
        norm = (x, weight, bias, y, mean, inverse)
        layer_norm_kernel[(rows,)](*norm, columns, columns, 1e-6, BLOCK=block, num_warps=warps)


def _figures() -> list[Figure]:
    tutorial = "triton-lang/triton, pull request 5726: matmul_kernel of tutorial 09"
    liger = "Liger-Kernel, benchmark/data/all_benchmark_data.csv at ead96b6, version 0.6.0"
    older = "Liger-Kernel, benchmark/data/h100_all_benchmark_data.csv at 3534d44, version 0.5.2"
    autotuned = 2e-6 * 3072**3 / 524.74
    found = [
        Figure(
            "elementwise, 3 tensors of 8192² bf16", 122, "H200", "arXiv 2603.22276, its records",
            lambda: _compose(8192, 8192), None,
        ),
    ]  # fmt: skip
    for columns, us in ((4096, 51.0), (8192, 94.8), (16384, 184.8)):
        found.append(
            Figure(
                f"layer norm, 4096 x {columns} fp32", us, "H100", liger,
                partial(_norm, 4096, columns, torch.float32, rms=False), None,
            )
        )  # fmt: skip
    for columns, us in ((8192, 30.3), (16384, 63.9)):
        found.append(
            Figure(
                f"RMS norm, 2048 x {columns} bf16", us, "H100 NVL", older,
                partial(_norm, 2048, columns, torch.bfloat16, rms=True), None,
            )
        )  # fmt: skip
    found += [
        Figure("GEMM 8192 x 8192 x 512 fp16", 315.9, "H100", tutorial, lambda: _matmul(8192, 8192, 512), 512 / 64),
        Figure(
            "GEMM 3072³ fp16", autotuned, "H100", "triton-lang/triton, issue 3672: tutorial 03, autotuned",
            lambda: _matmul(3072, 3072, 3072), 3072 / 64,
        ),
    ]  # fmt: skip
    return found


def main() -> int:
    """Estimate, and print each beside what was published."""
    print("| kernel | card | estimated µs | limit | published µs | estimate / published | source |")
    print("| --- | --- | ---: | --- | ---: | ---: | --- |")
    for figure in _figures():
        with recording() as seen:
            figure.launch()
        (launch,) = seen.launches
        rate = CARDS[figure.card]
        with patch.multiple(device, BANDWIDTH=rate, COPY=device.COPY * rate / device.BANDWIDTH):
            found = kernel_of(launch, compiled(launch.binary), figure.turns)
        print(
            f"| {figure.of} | {figure.card} | {found.total:.0f} | {found.limit} | {figure.microseconds:.0f} "
            f"| {found.total / figure.microseconds:.2f} | {figure.source} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
