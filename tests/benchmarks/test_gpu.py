"""benchmarks.gpu: what a few minutes of a GPU decide, as far as a CPU can tell: what is written
when, what is said of what was not done, which kernels are compiled ahead.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles and launches nothing", allow_module_level=True)

from benchmarks import tune, tune_tiles
from benchmarks.codegen.calls import Layer, steps_of
from benchmarks.codegen.recording import Gemm, Launch, recording
from benchmarks.gpu import figures, layers, ready, right
from benchmarks.gpu.rows import Rows
from benchmarks.timing import CpuClock
from benchmarks.tune_state import State
from delora_kernels.backends.triton import tables

LAYER = Layer("dora", 64, 48, 16, T=32)


def test_a_row_is_on_the_disk_before_the_next_one(tmp_path: Path) -> None:
    table = Rows(tmp_path / "new", "figures", {"device": "NVIDIA H200"}, show=False)
    for count in range(3):
        on_disk = json.loads((tmp_path / "new/figures.json").read_text())
        assert on_disk == {"machine": {"device": "NVIDIA H200"}, "rows": [{"us": float(i)} for i in range(count)]}
        table.add({"us": float(count)})
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["figures.json"]


def test_checks_in_processes_of_their_own(tmp_path: Path) -> None:
    """One that passes, a command that fails with its last lines, and what there was no time for."""
    setting = right.Setting("cpu", 3, ("float32",))
    checks = [job for job in right.jobs(["eager"], setting) if not job.command]
    assert {"eager: op fold float32", "eager: dora float32"} <= {job.name for job in checks}
    passing = next(job for job in checks if job.name == "eager: op fold float32")
    failing = right.Job("a command", command=(sys.executable, "-c", "print('broken'); raise SystemExit(1)"))
    table = Rows(tmp_path, "right", {}, show=False)
    assert right.run([passing, failing], setting, table, 120, workers=1) == 1
    rows = {row["job"]: row for row in table.rows}
    assert rows[passing.name]["status"] == "ok"
    assert "of its limit" in rows[passing.name]["says"]
    assert (rows["a command"]["status"], rows["a command"]["says"]) == ("FAILED", "broken")

    late = Rows(tmp_path, "late", {}, show=False)
    slow = right.Job("slow", command=(sys.executable, "-c", "import time; time.sleep(60)"))
    began = time.monotonic()
    assert right.run([slow, slow._replace(name="behind it")], setting, late, 3, workers=1) == 3
    assert time.monotonic() - began < 30
    assert {row["job"]: row["status"] for row in late.rows} == dict.fromkeys(("slow", "behind it"), "not done in time")


def test_a_command_is_stopped_with_what_it_started() -> None:
    """A test under compute-sanitizer is a process of the sanitizer's, and holds its pipe."""
    slow = right.Job("slow", command=("sh", "-c", "echo begun; sleep 61.5 & echo $!; wait"))
    began = time.monotonic()
    status, says, _ = right.done(slow, right.Setting("cpu", 3), began + 1)
    assert (status, time.monotonic() - began < 30) == ("not done in time", True)
    for _ in range(100):  # an orphan that is dead stays until whoever took it in looks
        state = Path(f"/proc/{int(says)}/stat")
        if not state.exists() or state.read_text().split()[2] == "Z":
            return
        time.sleep(0.05)
    pytest.fail("it runs on")


def test_checks_in_the_dtype_of_training_come_first() -> None:
    names = [job.name for job in right.jobs(["triton"], right.Setting("cpu", 3)) if not job.command]
    dtypes = [name.split()[-1] for name in names if "float" in name and not name.startswith("triton: base")]
    assert [dtypes.index(name) for name in right.DTYPES] == sorted(dtypes.index(name) for name in right.DTYPES)
    assert "bfloat16" not in "".join(dtypes[dtypes.index("float32") :])


def test_what_the_checks_launch_is_known_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    from delora_kernels.diagnostics import check

    every, chosen = check.jobs, ("op project", "lora", "dora", "ether")
    monkeypatch.setattr(check, "GPU_SIZES", ((193, 264, 136, 20),))
    monkeypatch.setattr(check, "jobs", lambda *given: [job for job in every(*given) if job.method in chosen])
    binaries = right.binaries(right.Setting("cuda", 3, ("float32",)))
    assert len(binaries) == len({binary.key for binary in binaries})
    wanted = {"times_small", "token_sums", "rank_update", "row_norm", "scaled", "reflect"}
    assert wanted <= {binary.kernel.removesuffix("_kernel") for binary in binaries}
    assert {binary.signature["X"] for binary in binaries if binary.kernel == "times_small_kernel"} == {"*fp32"}


def test_each_launch_is_timed_where_it_is_made() -> None:
    """In the order, with the grids and bytes of what was recorded; in front of the stand-in."""
    expected = [step for step in steps_of(LAYER) if isinstance(step, Launch)]
    with recording() as seen:
        rows = figures.launches(LAYER, "cpu", CpuClock())
    assert [row["kernel"] for row in rows] == [step.binary.kernel.removesuffix("_kernel") for step in expected]
    for row, step in zip(rows, expected, strict=True):
        assert tuple(row["grid"]) == step.grid[: len(row["grid"])]
        assert row["bytes"] == sum(operand.bytes for operand in step.operands)
    assert len(seen.launches) == len(rows) * (figures.TIMED.warmup + figures.TIMED.least)


def test_what_raises_is_a_row_and_the_next_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also our GEMM beside the library's; what there was no time for is named."""
    monkeypatch.setattr(figures, "SHAPES", ((64, 48),))
    monkeypatch.setattr(figures.kernel_figures, "TOKENS", 32)
    monkeypatch.setattr(figures, "layers", lambda: [LAYER, LAYER._replace(method="lora")])
    real = figures.launches

    def broken(layer: Layer, *others: Any) -> Any:
        if layer.method == "dora":
            raise RuntimeError("CUDA error: an illegal\nmemory access")
        return real(layer, *others)

    def out_of_registers(*_: Any, **__: Any) -> Any:
        raise RuntimeError("out of resources")

    monkeypatch.setattr(figures, "launches", broken)
    monkeypatch.setattr(figures.kernel_figures, "rank_gemm", out_of_registers)
    table = Rows(tmp_path, "figures", {}, show=False)
    with recording():
        assert figures.measure(table, "cpu", CpuClock(), time.monotonic() + 600)
        late = Rows(tmp_path, "late", {}, show=False)
        assert not figures.measure(late, "cpu", CpuClock(), time.monotonic() - 1)
    on_disk = json.loads((tmp_path / "figures.json").read_text())["rows"]
    assert [row["figure"] for row in on_disk if "figure" in row] == ["beta=1 / beta=0"]
    failed = [row for row in on_disk if "failed" in row]
    assert failed == [
        {"failed": "dora r=16", "K": 64, "N": 48, "says": "RuntimeError: CUDA error: an illegal memory access"}
    ]
    assert [row["number"] for row in on_disk if row.get("layer") == "lora r=16"] == list(range(6))
    assert late.rows == []
    assert late.record["machine"]["left"] == ["GEMMs 64 → 48", "dora r=16 64 → 48", "lora r=16 64 → 48"]


def test_estimates_come_to_the_launches_they_are_of() -> None:
    launch = {"layer": "lora r=16", "K": 64, "N": 48, "us": 9.0}
    rows = [{"figure": "beta=1 / beta=0", "K": 64, "N": 48}]
    rows += [launch | {"number": 0, "kernel": "fold"}, launch | {"number": 1, "kernel": "route"}]
    rows += [launch | {"number": 0, "kernel": "fold", "N": 64}, launch | {"number": 5, "kernel": "fold"}]
    guesses = [{"kernel": "fold", "us": 2.0, "limit": "chain"}, {"kernel": "times_small", "us": 9.5, "limit": "bytes"}]
    figures.add_estimates(rows, [{"layer": "lora r=16", "K": 64, "N": 48, "kernels": guesses}])
    assert [row.get("estimate_us") for row in rows] == [None, 2.0, None, None, None]
    assert rows[1]["limit"] == "chain"


def test_layers_go_on_where_they_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = list(layers.cases())[:2]
    measured: list[str] = []

    def measure(case: Any, *_: Any) -> list[dict[str, Any]]:
        measured.append(case.key)
        return [{"impl": "dk", "status": "ok", "median_ms": 1.0, "ratio_to_frozen": None}]

    monkeypatch.setattr(layers, "measure", measure)
    monkeypatch.setattr(layers, "measure_model", lambda case, *_: measure(case))
    monkeypatch.setattr(layers, "_ceilings", lambda *_: {"half": "bf16"})
    monkeypatch.setattr(layers, "cases", lambda: wanted)
    now = iter([0.0, 9.0, 9.0])
    out, machine = tmp_path / "layers.json", {"device": "NVIDIA H200", "commit": "a"}
    with monkeypatch.context() as patched:
        patched.setattr(layers.time, "monotonic", lambda: next(now))
        assert layers.run(out, dict(machine), "cpu", CpuClock(), until=1.0) == 3
    left = json.loads(out.read_text())["machine"]["left"]
    assert (measured, left[0]) == ([wanted[0].key], wanted[1].key)
    assert layers.run(out, dict(machine), "cpu", CpuClock(), until=time.monotonic() + 600) == 0
    record = json.loads(out.read_text())
    assert (measured[:2], len(measured), len(record["rows"])) == ([case.key for case in wanted], 3, 3)
    assert [path.name for path in tmp_path.iterdir()] == ["layers.json"]


def test_what_is_compiled_ahead_is_what_is_launched() -> None:
    """With the options that Triton asks for, which its cache goes by; each once."""
    several = [LAYER, LAYER._replace(K=128), LAYER._replace(method="lora")]
    binaries = ready.binaries_of(several)
    launched = {step.binary.key for layer in several for step in steps_of(layer) if isinstance(step, Launch)}
    assert sorted(binary.key for binary in binaries) == sorted(launched)
    assert all({"num_warps", "num_stages", "num_ctas", "arch"} <= set(binary.options) for binary in binaries)


def test_the_layers_are_compiled_as_they_are_measured() -> None:
    cases = list(layers.cases())
    assert {case.method for case in cases} == {"lora", "dora", "delora", "goat", "ether-plus-both"}
    assert {(case.K, case.N) for case in cases} == set(figures.SHAPES)
    assert {case.r for case in cases if case.method == "dora"} == {16, 64}
    assert [(layer.method, layer.K, layer.N) for layer in layers.layers()] == [(c.method, c.K, c.N) for c in cases]


def test_losses_are_sorted() -> None:
    rows: list[dict[str, Any]] = [{"figure": "beta=1 / beta=0", "us": 1.0}]
    for name, lost in (("a", 3.0), ("b", 9.0), ("c", -1.0)):
        facts = {"layer": "lora", "K": 1, "N": 1, "us": 10.0, "estimate_us": None, "bytes_us": 10 - lost}
        rows.append({"kernel": name, "lost_us": lost} | facts)
    assert [line.split()[1] for line in figures.by_loss(rows)[2:]] == ["b", "a", "c"]


def test_tuning_goes_on_where_it_stopped(tmp_path: Path) -> None:
    machine = {"device": "NVIDIA H200", "driver": "1", "triton": "3", "commit": "a"}
    state = State(tmp_path / "tune.json", machine, seconds=3600)
    state.keep("row_norm 16", [64, 64, 8, 2])
    state.keep("dy_sums 16", None)
    again = State(tmp_path / "tune.json", dict(machine), seconds=-1)
    assert again.done == {"row_norm 16": [64, 64, 8, 2], "dy_sums 16": None}
    assert (again.late(), again.stopped, state.late()) == (True, True, False)
    with pytest.raises(ValueError, match="begun with device 'NVIDIA H200'"):
        State(tmp_path / "tune.json", machine | {"device": "NVIDIA H100"})


def test_tuning_times_nothing_twice_and_nothing_late(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    timed = []
    monkeypatch.setattr(tune_tiles, "_fastest", lambda own, name, limit, *_: timed.append((name, limit)))
    state, (name, limit) = State(seconds=3600), tune_tiles.jobs((9, 0))[0]
    state.done = {f"{name} {limit}": [64, 128, 8, 3]}
    found = tune_tiles.tuned((9, 0), "cpu", CpuClock(), tune.Budget(), state)
    assert found == {((9, 0), name): {limit: (64, 128, 8, 3)}}
    assert timed == tune_tiles.jobs((9, 0))[1:]
    timed.clear()
    assert tune_tiles.tuned((9, 0), "cpu", CpuClock(), tune.Budget(), State(seconds=-1)) == {}
    assert timed == []


def test_what_a_step_in_16_bits_launches_is_tuned_first() -> None:
    names = [name for name, _ in tune_tiles.jobs((9, 0))]
    assert [name.partition(" ")[2] for name in names[:4]] == [""] * 4
    assert sorted(set(names)) == sorted({*tune_tiles.timed(), tables.GEMM})
    first = {kind: [name.endswith(kind) for name in names].index(True) for kind in ("scaled", "mixed", "fp32")}
    assert list(first.values()) == sorted(first.values())


def test_every_candidate_is_compiled_ahead() -> None:
    """Each once, the shipped tiles among them."""
    limit, shipped = next(iter(tables.TABLES["rank_update"].items()))
    binaries = tune_tiles.candidates_of((9, 0), "rank_update", limit)
    assert len(binaries) == len({binary.key for binary in binaries})
    assert len(binaries) == len({tuple(shipped), *tune_tiles._candidates("rank_update")})


def test_the_librarys_gemms_are_recorded() -> None:
    """Form (d): the GEMM adds to what the prefill wrote, forward and backward."""
    gemms = [step for step in steps_of(LAYER._replace(method="lora")) if isinstance(step, Gemm)]
    assert gemms == [Gemm(32, 64, 48, True), Gemm(32, 48, 64, True)]
