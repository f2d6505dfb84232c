"""benchmarks.codegen.configurations: what is compiled without a GPU, and that a spill or too much
shared memory fails it.
"""

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

from benchmarks import tune_tiles
from benchmarks.codegen import configurations as codegen
from benchmarks.codegen import variants as codegen_variants
from delora_kernels.backends.triton import tables
from delora_kernels.backends.triton.rank_update import TURN
from delora_kernels.backends.triton.times_small import FEWEST_RANKS

KEYS = {"kernel", "arch", "config", "registers", "spill_bytes", "shared_bytes", "mma"}


def test_every_table_entry_is_compiled() -> None:
    """Each kernel, rank class and mix of dtypes, with what its launches differ in."""
    seen = {(variant.kernel, variant.config) for variant in codegen.variants()}
    assert {table.split()[0] for table in tables.TABLES} == set(codegen_variants.FEATURES)
    for kernel, features in codegen_variants.FEATURES.items():
        for rank_class in tables.TABLES[kernel]:
            for types in codegen_variants.TYPES if kernel != "dy_sums" else ("bf16", "bf16+fp32", "fp16"):
                most = max(map(int, tables.TABLES["row_norm" if types in ("bf16", "fp16") else "row_norm mixed"]))
                never = {
                    "term": types not in ("bf16", "fp16"),
                    "turns": int(rank_class) > TURN if kernel == "rank_update" else int(rank_class) != most,
                    "planes": types != "bf16+fp32" or int(rank_class) <= FEWEST_RANKS,
                }
                for feature in features:
                    if not never.get(feature, False) and not (kernel == "row_norm" and int(rank_class) > most):
                        assert (kernel, f"{types} R={rank_class} {feature}".strip()) in seen
    gemms = {config for kernel, config in seen if kernel == "rank_gemm"}
    assert {f"bf16 {layout} {way}" for layout in ("NT", "NN") for way in tables.GEMMS} <= gemms


def test_what_is_tuned_for_a_device_is_compiled_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tables.TILES, ((9, 0), "token_sums fp32"), {"16": (32, 32, 4, 1)})
    monkeypatch.setitem(tables.TILES, ((9, 0), tables.GEMM), {"pointers": (64, 64, 32, 4, 2, 7)})
    for capability, token, inner in (((9, 0), 32, 32), ((8, 0), 64, 64)):
        made = {(v.kernel, v.config): v for v in codegen.variants(capability)}
        fp32 = made["token_sums", "fp32 R=16"]
        assert (fp32.constants["BT"], fp32.constants["STAGES"]) == (token, 1 if token == 32 else 3)
        assert made["token_sums", "bf16 R=16"].constants["BT"] == 64
        assert made["rank_gemm", "bf16 NT pointers"].constants["BD"] == inner
        assert (("rank_gemm", "bf16 NT descriptors") in made) == (capability == (9, 0))


def test_tuned_tiles_that_spill_are_not_written() -> None:
    assert tune_tiles._compiles((9, 0), "dy_sums mixed", "16", (32, 64, 4, 2))
    assert not tune_tiles._compiles((9, 0), "times_small", "128", (128, 128, 1, 1))


@pytest.mark.parametrize("arch", ["sm_80", "sm_90"])
def test_record(arch: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [v for v in codegen.variants() if v.config in ("bf16 R=16", "fp32 R=16", "") and v.kernel != "row_norm"]
    monkeypatch.setattr(codegen, "variants", lambda capability: chosen)
    monkeypatch.setattr(codegen, "ProcessPoolExecutor", lambda: ThreadPoolExecutor(1))
    file = tmp_path / "codegen.json"
    monkeypatch.setattr("sys.argv", ["codegen", "--arch", arch, "--json", str(file)])
    assert codegen.main() == 0
    rows = json.loads(file.read_text())
    assert len(rows) == len(chosen)
    assert all(set(row) == KEYS and row["spill_bytes"] == 0 and row["registers"] > 0 for row in rows)
    gemms = {row["config"]: row["mma"] for row in rows if row["kernel"] == "times_small"}
    assert gemms == {"bf16 R=16": "wgmma" if arch == "sm_90" else "mma.sync", "fp32 R=16": None}
    assert "no spill, all fit, wgmma" in capsys.readouterr().out


def test_what_does_not_fit_fails(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    chosen = [v for v in codegen.variants() if v.kernel == "times_small" and v.config == "bf16+fp32 R=128"]
    assert codegen.why_not(codegen.compile_variant(chosen[0], "sm_90")) is None
    spilling = [chosen[0]._replace(options={"num_warps": 1, "num_stages": 1})]
    for made, limit in ((spilling, 1 << 30), (chosen, 100)):
        monkeypatch.setattr(codegen, "variants", lambda capability, made=made: made)
        monkeypatch.setitem(codegen.SHARED_LIMIT, "sm_90", limit)
        monkeypatch.setattr("sys.argv", ["codegen", "--arch", "sm_90"])
        assert codegen.main() == 1
        assert "FAILED: times_small sm_90 bf16+fp32 R=128" in capsys.readouterr().out


def test_products_off_the_matrix_units_fail() -> None:
    row = {"kernel": "times_small", "arch": "sm_90", "config": "bf16 R=16", "spill_bytes": 0, "shared_bytes": 0}
    assert codegen.why_not(row | {"mma": "mma.sync"}) == "its products do not run on wgmma"
    for fine in ({"mma": "wgmma"}, {"mma": None, "arch": "sm_80"}, {"mma": None, "config": "fp32 R=16"}):
        assert codegen.why_not(row | fine) is None


def test_sizes_of_one() -> None:
    """Triton makes a constant of every argument that is 1; kernels must not treat it as a
    tensor.
    """
    first: dict[tuple[str, bool], codegen.Variant] = {}
    for variant in codegen.variants():
        first.setdefault((variant.kernel, variant.config.endswith("dropout")), variant)
    assert {kernel for kernel, _ in first} >= {
        *codegen_variants.FEATURES,
        "rank_gemm",
        "fold",
        "fold_backward",
        "finish_dy",
        "project_route",
        "route",
        "route_backward",
    }
    for variant in first.values():
        assert codegen.compile_variant(variant, "sm_90", ones=True)["registers"] > 0
