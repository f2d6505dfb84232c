"""benchmarks.codegen_cuda: what ptxas says is read right, and a spill, too much shared memory or a
warning fails it.
"""

import shutil
from pathlib import Path

import pytest

from benchmarks import codegen_cuda

TEXT = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function '_ZN2dk4foldE' for 'sm_90'
ptxas info    : Function properties for _ZN2dk4foldE
    8 bytes stack frame, 4 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 87 registers, used 1 barriers, 8 bytes cumulative stack size, 16 bytes smem
ptxas info    : Compiling entry function '_ZN2dk5scaleE' for 'sm_90'
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 26 registers, used 0 barriers
"""
FINE = {"kernel": "times_small", "arch": "sm_75", "config": "fp16, fp16, 16", "spill_bytes": 0, "shared_bytes": 49152}


def test_what_ptxas_says() -> None:
    first, second = codegen_cuda.parse(TEXT)
    assert first | {"spill_bytes": 12, "registers": 87, "shared_bytes": 16} == first
    assert second | {"spill_bytes": 0, "registers": 26, "shared_bytes": 0} == second


def test_what_must_not_be_shipped() -> None:
    assert codegen_cuda.why_not(FINE | {"mma": "wmma"}) is None
    assert codegen_cuda.why_not(FINE | {"mma": None}) == "its products do not run on tensor cores"
    assert codegen_cuda.why_not(FINE | {"mma": None, "config": "bf16, bf16, 16"}) is None  # sm_75 has none for it
    assert codegen_cuda.why_not(FINE | {"mma": None, "config": "fp16, fp32, 16"}) is None
    assert codegen_cuda.why_not(FINE | {"mma": None, "config": "tf32, tf32, 16"}) is None  # nor for tf32
    for config in ("bf16, bf16, 16", "fp16, fp32, 16", "tf32, tf32, 16"):
        row = FINE | {"arch": "sm_80", "config": config}
        assert codegen_cuda.why_not(row | {"mma": None}) == "its products do not run on tensor cores"
        assert codegen_cuda.why_not(row | {"mma": "tf32"}) is None
    assert codegen_cuda.why_not(FINE | {"mma": None, "arch": "sm_80", "config": "fp32, fp32, 16"}) is None
    assert codegen_cuda.why_not(FINE | {"mma": "wmma", "spill_bytes": 4}) == "spills 4 bytes"
    assert "asks for 49153 bytes" in str(codegen_cuda.why_not(FINE | {"mma": "wmma", "shared_bytes": 49153}))


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_rows_of_a_file_and_a_warning(tmp_path: Path) -> None:
    rows = codegen_cuda.compile_file(codegen_cuda.CSRC / "scaled.cu", "sm_90")
    assert sorted(row["config"] for row in rows) == ["bf16", "fp16", "fp32"]
    assert all(row["kernel"] == "scaled" and 0 < row["registers"] < 64 and row["mma"] is None for row in rows)
    assert "| scaled | 3 |" in codegen_cuda.summary(rows)
    warning = tmp_path / "warning.cu"
    warning.write_text("__global__ void kernel() { int nobody_reads_this; }\n", encoding="utf-8")
    with pytest.raises(RuntimeError, match="nobody_reads_this"):
        codegen_cuda.compile_file(warning, "sm_90")
