"""The benchmark of experts: its passes compute the same, its figures are what they are called."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("transformers", "5")

from benchmarks import experts
from benchmarks.timing import Budget

TINY = experts.ExpertsCase(T=9, E=6, top_k=2, H=16, inner=8, r=2)

SIZES = ["--experts", "6", "--top-k", "2", "--hidden", "16", "--inner", "8", "--rank", "2", "--tokens", "9"]


def test_passes_give_the_same_gradients() -> None:
    forwards, leaves = experts.passes(TINY, "cpu")
    found = {}
    for name, forward in forwards.items():
        y = forward()
        grads = torch.autograd.grad(y, leaves, torch.ones_like(y), allow_unused=True)
        found[name] = [y, *grads]
    assert found["frozen"][3] is None
    assert not torch.allclose(found["frozen"][0], found["peft"][0], rtol=1e-3)
    for name in ("peft-eager", "loop", "dk"):
        for ours, theirs in zip(found[name], found["peft"], strict=True):
            assert (ours - theirs).abs().max() <= 2e-5 * theirs.abs().max()


def test_skewed_routing() -> None:
    case = experts.ExpertsCase(T=64, E=16, top_k=2, skewed=True)
    counts = torch.bincount(experts.routing(case, torch.Generator().manual_seed(0)).flatten(), minlength=16)
    assert counts[0] >= 64
    assert not counts[1::2].any()


def test_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "experts.json"
    assert experts.main(["--device", "cpu", "--threads", "1", "--rounds", "3", *SIZES, "--out", str(out)]) == 0
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    assert tuple(rows) == experts.IMPLEMENTATIONS
    assert rows["frozen"]["ratio_to_frozen"] == 1.0
    assert "over frozen" in capsys.readouterr().out


def test_sweep_and_quick_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every choice of the sizes that are listed, where a token has as many experts to choose."""
    seen: list[experts.ExpertsCase] = []
    monkeypatch.setattr(experts, "measure", lambda case, *_: seen.append(case) or [])
    monkeypatch.setattr(experts, "write", lambda *_: None)
    lists = ["--tokens", "3", "5", "--experts", "2", "4", "--top-k", "1", "4", "--rank", "2", "64"]
    assert experts.main(["--device", "cpu", "--threads", "1", *lists, "--skewed"]) == 0
    found = [(case.T, case.E, case.top_k, case.r) for case in seen]
    assert found == [(T, E, k, r) for E, k in ((2, 1), (4, 1), (4, 4)) for r in (2, 64) for T in (3, 5)]
    assert all(case.skewed for case in seen)
    seen.clear()
    assert experts.main(["--device", "cpu", "--threads", "1", "--quick"]) == 0
    assert tuple(seen) == experts.QUICK


def test_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """What the record holds is not measured again; what it lacks, and another machine's, is."""
    out, measured = tmp_path / "experts.json", list[Any]()

    def measure(case: experts.ExpertsCase, device: str, budget: Budget, names: tuple[str, ...]) -> list[dict[str, Any]]:
        measured.append((case.T, case.r, names))
        found = {"ratio_to_frozen": 1.0, "interval": [1.0, 1.0], "median_ms": 1.0}
        found |= dict.fromkeys(("allocated_mib", "saved_mib", "peak_mib"), 1.0)
        return [{"impl": name, **experts.columns(case), **found} for name in names]

    monkeypatch.setattr(experts, "measure", measure)
    command = ["--device", "cpu", "--threads", "1", "--tokens", "3", "5", "--rank", "2", f"--out={out}", "--impl", "dk"]
    write = experts.write

    def stopped(*args: Any) -> None:
        write(*args)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(experts, "write", stopped)
        with pytest.raises(KeyboardInterrupt):
            experts.main(command)
    assert [row["T"] for row in json.loads(out.read_text())["rows"]] == [3, 3]
    assert experts.main([*command, "--resume"]) == 0
    assert measured == [(3, 2, ("frozen", "dk")), (5, 2, ("frozen", "dk"))]
    assert [row["T"] for row in json.loads(out.read_text())["rows"]] == [3, 3, 5, 5]
    assert experts.main([*command, "loop", "--resume"]) == 0  # an implementation more: each case anew
    assert measured[2:] == [(T, 2, ("frozen", "dk", "loop")) for T in (3, 5)]
    record = json.loads(out.read_text())
    record["machine"]["cpu"] = "another"
    out.write_text(json.dumps(record))
    with pytest.raises(SystemExit):
        experts.main([*command, "--resume"])
    assert "was measured with another cpu" in capsys.readouterr().err


def test_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """One command, a line for each case; the slow rivals where a pass takes no seconds."""
    few = experts.ExpertsCase(T=9, E=6, top_k=2, H=16, inner=8, r=2)
    many = experts.ExpertsCase(T=24, E=6, top_k=2, H=16, inner=8, r=2, skewed=True)
    monkeypatch.setattr(experts, "TABLE", (few, many))
    monkeypatch.setattr(experts, "FEW", 9)
    monkeypatch.setattr(experts, "SECONDS", 0.0)
    out = tmp_path / "experts.json"
    assert experts.main(["--device", "cpu", "--threads", "1", "--table", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == [*experts.IMPLEMENTATIONS, "frozen", "peft", "dk"]
    assert [row["rounds"] for row in rows] == [5] * 8
    printed = capsys.readouterr().out
    assert "overhead gone" in printed
    by = {(row["T"], row["impl"]): row for row in rows}
    for T in (9, 24):
        ratios = {name: by[T, name]["ratio_to_frozen"] for name in ("peft", "dk")}
        assert all(f"{ratio:.2f}" in printed for ratio in ratios.values())
        if ratios["peft"] > 1:
            assert f"{1 - (ratios['dk'] - 1) / (ratios['peft'] - 1):.0%}" in printed
    assert (
        experts.main(["--device", "cpu", "--threads", "1", "--rounds", "1", "--summary", "--impl", "dk", *SIZES]) == 0
    )
    printed = capsys.readouterr().out
    assert "kept, MiB" not in printed
    assert "overhead gone" in printed


def test_what_is_kept_and_allocated() -> None:
    """PEFT keeps W' of both projections, and allocates them and their gradients; dk neither."""
    case = experts.ExpertsCase(T=2, E=32, top_k=2, H=32, inner=16, r=2)
    rows = {row["impl"]: row for row in experts.measure(case, "cpu", Budget(seconds=0, least=1, most=1, warmup=0))}
    weights = 32 * 3 * 32 * 16 * 4 / experts.MIB
    assert rows["peft"]["saved_mib"] >= weights
    assert rows["peft"]["allocated_mib"] >= 2 * weights
    assert rows["dk"]["saved_mib"] <= weights / 4
    assert rows["dk"]["allocated_mib"] <= weights
