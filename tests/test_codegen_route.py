"""The mixture's kernels compile without a spill, also where sizes are 1."""

import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import codegen_route
from benchmarks.codegen import compile_variant


@pytest.mark.parametrize(("arch", "ones"), [("sm_80", False), ("sm_90", False), ("sm_90", True)])
def test_no_spill(arch: str, ones: bool) -> None:
    chosen = [v for v in codegen_route.variants() if v.config in ("bf16 E=8 r=4 top-2", "fp32 E=64 r=4 gates")]
    assert len(chosen) == 4
    rows = [compile_variant(variant, arch, ones=ones) for variant in chosen]
    assert all(row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)
