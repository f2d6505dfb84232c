"""benchmarks.codegen: what is compiled without a GPU, and that a spill or too much shared memory fails it."""

import json
import os
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import codegen
from delora_kernels.backends.triton import tables

KEYS = {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma"}


def test_every_table_entry_is_compiled() -> None:
    """Each kernel, rank class and mix of dtypes, with and without dropout."""
    seen = {(variant.kernel, variant.config) for variant in codegen.variants()}
    for kernel, classes in tables.TABLES.items():
        for rank_class in classes:
            for types in codegen.TYPES if kernel != "dy_sums" else ("bf16", "bf16+fp32", "fp16"):
                assert (kernel, f"{types} R={rank_class}") in seen
                assert kernel in ("row_norm", "dy_sums") or (kernel, f"{types} R={rank_class} dropout") in seen


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_record(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [v for v in codegen.variants() if v.config in ("bf16 R=16", "fp32 R=16", "")]
    monkeypatch.setattr(codegen, "variants", lambda: chosen)
    file = tmp_path / "codegen.json"
    monkeypatch.setattr("sys.argv", ["codegen", "--arch", arch, "--json", str(file)])
    assert codegen.main() == 0
    rows = json.loads(file.read_text())
    assert len(rows) == len(chosen)
    assert all(set(row) == KEYS and row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)
    gemms = {row["config"]: row["mma"] for row in rows if row["kernel"] == "times_small"}
    assert gemms == {"bf16 R=16": "wgmma" if arch == "sm_90" else "mma.sync", "fp32 R=16": None}
    assert "no spill, all fit" in capsys.readouterr().out


def test_what_does_not_fit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [v for v in codegen.variants() if v.kernel == "times_small" and v.config == "bf16+fp32 R=128"]
    spilling = [chosen[0]._replace(options={"num_warps": 1, "num_stages": 1})]
    for made, limit in ((spilling, 1 << 30), (chosen, 100)):
        monkeypatch.setattr(codegen, "variants", lambda made=made: made)
        monkeypatch.setitem(codegen.SHARED_LIMIT, "sm_90", limit)
        monkeypatch.setattr("sys.argv", ["codegen", "--arch", "sm_90"])
        assert codegen.main() == 1
        assert "FAILED: times_small sm_90 bf16+fp32 R=128" in capsys.readouterr().out


def test_sizes_of_one() -> None:
    """Triton makes a constant of every argument that is 1; kernels must not treat it as a tensor."""
    first: dict[tuple[str, bool], codegen.Variant] = {}
    for variant in codegen.variants():
        first.setdefault((variant.kernel, variant.config.endswith("dropout")), variant)
    assert {kernel for kernel, _ in first} == {*tables.TABLES, "fold", "fold_backward", "mask", "drop"}
    for variant in first.values():
        assert codegen.compile_variant(variant, "sm_90", ones=True)["registers"] > 0
