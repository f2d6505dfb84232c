"""The command: its record, what it does when it is killed and started again, the whole model."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import run, whole_model
from benchmarks.cases import BOTH, REFLECTIONS, SHAPES, Case, cases
from benchmarks.record import Mismatch, Partial, load
from benchmarks.report import reflections
from benchmarks.timing import Budget, CpuClock

COLUMNS = {"method", "impl", "mode", "T", "K", "N", "r", "E", "dtype", "adapter_dtype", "median_ms", "p20_ms", "p80_ms"}
COLUMNS |= {"peak_mib", "saved_mib", "ratio_to_frozen", "error_to_fp64"}
MACHINE = {"device", "driver", "cuda", "torch", "triton", "peft", "commit", "clocks", "copy_tbps", "gemm_tflops"}
HERE = {"device": "cpu", "cpu": "a", "threads": 1, "torch": "2", "commit": "c"}


@pytest.fixture
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three small cases, and ceilings of small tensors."""
    found = [Case("lora", "t", T, 16, 24, 4, "fp32") for T in (3, 5, 7)]
    monkeypatch.setattr(run, "cases", lambda *_: found)
    monkeypatch.setattr("benchmarks.ceilings.COPY_BYTES", {"cpu": 2**20})
    monkeypatch.setattr("benchmarks.ceilings.GEMM_SIZE", {"cpu": 64})


def command(out: Path) -> list[str]:
    return [
        "--set",
        "quick",
        "--methods",
        "lora",
        "--only",
        "layer",
        "--seconds",
        "0",
        "--device",
        "cpu",
        "--out",
        str(out),
    ]


def test_the_record_has_every_column_of_the_format(tiny: None, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "deep" / "bench.json"
    assert run.main(command(out)) == 0
    record = json.loads(out.read_text())
    assert record["machine"].keys() >= MACHINE
    assert record["machine"]["copy_tbps"] > 0
    assert record["machine"]["gemm_tflops"] > 0
    assert all(row.keys() >= COLUMNS for row in record["rows"])
    assert {row["T"] for row in record["rows"] if row["impl"] == "dk" and row["median_ms"] > 0} == {3, 5, 7}
    assert not out.with_name("bench.json.partial").exists()
    assert "100%" in capsys.readouterr().err


def test_a_killed_run_loses_only_the_case_in_flight(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "bench.json"
    measured: list[int] = []
    from benchmarks.layer import measure as module

    whole = module.measure

    def killed_at_the_third(case: Case, *args: Any) -> Any:
        measured.append(case.T)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return whole(case, *args)

    monkeypatch.setattr(module, "measure", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        run.main(command(out))
    partial = out.with_name("bench.json.partial")
    assert [row["T"] for row in load(partial)["rows"] if row["impl"] == "dk"] == [3, 5]
    with partial.open("ab") as file:
        file.write(b'{"case": "torn by the ki')
    assert run.main(command(out)) == 0
    assert measured == [3, 5, 7, 7]
    assert [row["T"] for row in load(out)["rows"] if row["impl"] == "dk"] == [3, 5, 7]


def test_a_run_pauses_when_its_minutes_are_over(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """On a clock that goes on a minute at each look, two cases begin within 2.5; the same command
    does the third.
    """
    minutes = iter(range(100))
    monkeypatch.setattr(run, "monotonic", lambda: 60.0 * next(minutes))
    out = tmp_path / "bench.json"
    assert run.main([*command(out), "--minutes", "2.5"]) == 3
    assert "2 of 3 cases are in" in capsys.readouterr().err
    assert not out.exists()
    assert run.main(command(out)) == 0
    assert [row["T"] for row in load(out)["rows"] if row["impl"] == "dk"] == [3, 5, 7]


def test_a_partial_file_of_another_run_is_refused(tiny: None, tmp_path: Path, capsys: Any) -> None:
    out = tmp_path / "bench.json"
    Partial(out, {"set": "full"}, HERE).begin()
    assert run.main(command(out)) == 2
    assert "was begun with set 'full', this run has 'quick'" in capsys.readouterr().err
    with pytest.raises(Mismatch, match="commit 'c', this run has 'd'"):
        Partial(out, {"set": "full"}, HERE | {"commit": "d"})


def test_a_refused_kernel_is_the_exit_status(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from delora_kernels.backends import eager

    whole = eager.project
    monkeypatch.setattr(eager, "project", lambda *args: 2 * whole(*args))
    assert run.main(command(tmp_path / "bench.json")) == 1
    assert "failed: lora dk T=3 fp32: y is off by" in capsys.readouterr().out


def test_a_rivals_failure_is_a_row_and_no_exit_status(
    tiny: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    from benchmarks.layer import rivals

    whole = rivals.addmm
    monkeypatch.setattr(rivals, "addmm", lambda *args: 2 * whole(*args))
    out = tmp_path / "bench.json"
    assert run.main(command(out)) == 0
    said = capsys.readouterr().out
    assert "failed: lora addmm T=3 fp32: y is off by" in said
    assert "0 of ours failed, 3 of others" in said
    rows = load(out)["rows"]
    assert [row["status"] for row in rows if row["impl"] == "addmm"] == ["failed"] * 3
    assert all(row["median_ms"] > 0 for row in rows if row["impl"] == "dk")


@pytest.mark.parametrize("which", ["quick", "standard", "full"])
@pytest.mark.parametrize(("device", "half"), [("cpu", "fp32"), ("cpu", "bf16"), ("cuda", "bf16"), ("cuda", "fp16")])
def test_every_case_of_a_set_is_there_once(which: str, device: str, half: str) -> None:
    methods = ("lora", "dora", "moe", "goat", *REFLECTIONS)
    found = list(cases(which, methods, device, half))
    assert len({case.key for case in found}) == len(found) > 0
    assert all((case.K, case.N) == SHAPES[case.shape] for case in found)
    assert {case.method for case in found} == set(methods)
    assert all((case.E is None) == (case.method not in ("moe", "goat")) for case in found)
    assert all((case.n_blocks is None) == (case.method not in REFLECTIONS) for case in found)
    assert {case.n_blocks for case in found if case.method == REFLECTIONS[-1]} == {1, 4, 32}
    assert all(case.K % case.n_blocks == case.N % case.n_blocks == 0 for case in found if case.n_blocks)
    mixtures = [case for case in found if case.method == "moe" and case.mode == BOTH]
    assert {case.r for case in mixtures} >= {1, 2, 4, 16}  # what the check of ranks compares
    if which == "full":
        assert {case.E for case in mixtures} == {2, 4, 8, 16, 32, 64}
        assert {case.k for case in mixtures} >= {1, 2, 4, 8, 64}
        assert {case.r for case in mixtures} == {1, 2, 4, 8, 16, 32}


@pytest.mark.parametrize("half", ["fp32", "bf16"])
def test_the_standard_set_has_what_the_check_of_reflections_looks_at(half: str) -> None:
    found = list(cases("standard", REFLECTIONS, "cpu", half))
    place = [case for case in found if (case.T, case.K, case.N, case.precision) == reflections.CPU_PLACE]
    assert {case.method for case in place if case.mode == BOTH and case.n_blocks == 1} == set(REFLECTIONS)
    found = list(cases("standard", REFLECTIONS, "cuda", "bf16"))
    place = [case for case in found if (case.T, case.K, case.N) == reflections.GPU_PLACE]
    assert {case.method for case in place if case.mode == BOTH} >= set(reflections.OVER_FROZEN)


def model_case(method: str, **others: Any) -> whole_model.ModelCase:
    sizes = {"hidden": 32, "intermediate": 48, "heads": 2, "kv_heads": 1, "vocabulary": 64, "blocks": 1}
    return whole_model.ModelCase(method, "tiny", **sizes, batch=1, sequence=32, r=4, precision="fp32", **others)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_a_whole_model(method: str, checkpointing: bool) -> None:
    case = model_case(method, checkpointing=checkpointing, limit_mib=0.5)
    rows = whole_model.measure_model(case, "cpu", CpuClock(), Budget(0, 3, 3, 1))
    for row in rows:
        assert row["status"] == "ok", row["note"]
        assert row["tokens_per_s"] == pytest.approx(32e3 / row["median_ms"])
        assert row["longest_sequence"] >= 32
    peft, ours = rows
    assert (peft["impl"], ours["impl"]) == ("peft", "dk")
    assert ours["longest_sequence"] >= peft["longest_sequence"]


def test_a_broken_model_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from delora_kernels.backends import eager

    whole = eager.input_backward
    monkeypatch.setattr(eager, "input_backward", lambda *args: (whole(*args)[0], 1.01 * whole(*args)[1]))
    peft, ours = whole_model.measure_model(model_case("lora"), "cpu", CpuClock(), Budget(0, 3, 3, 1))
    assert peft["status"] == "ok"
    assert ours["status"] == "failed"
    assert "gradient of lora_A is off by" in ours["note"]
    assert ours["median_ms"] is None


@pytest.mark.parametrize(
    ("longest", "start"), [(0, 64), (31, 64), (32, 64), (100, 64), (1000, 64), (1000, 4096), (5000, 32)]
)
def test_longest_sequence(longest: int, start: int) -> None:
    tried: list[int] = []
    found = whole_model.longest_sequence(lambda length: (tried.append(length), length <= longest)[1], start)
    assert found % 32 == 0
    assert found <= longest < found + max(32, found // 16) + 32
    assert len(tried) <= 16
