"""The benchmark of stored bases: its implementations compute the same, and its record says what."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

from benchmarks import stored_bases


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_implementations_compute_the_same(method: str) -> None:
    made = stored_bases.passes("nf4", method, (6, 64, 24), 4, "cpu")
    y = {name: module(made["x"]) for name, module in made["modules"].items()}
    assert (y["dk"] - y["peft"]).abs().max() <= 1e-5 * y["peft"].abs().max()
    assert not torch.equal(y["peft"], y["frozen"])


def test_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "stored.json"
    arguments = ["--form", "nf4", "--method", "dora", "--rounds", "3", "--shape", "32", "64", "48", "--rank", "4"]
    assert stored_bases.main([*arguments, "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == list(stored_bases.IMPLEMENTATIONS)
    saved, peak = ({row["impl"]: row[name] for row in rows} for name in ("saved_mib", "peak_mib"))
    assert saved["frozen"] < saved["dk"] < saved["peft"]
    assert peak["frozen"] < peak["dk"] <= peak["peft"]
    assert [row["ratio_to_peft"] for row in rows if row["impl"] == "peft"] == [1.0]
    assert "kept," in capsys.readouterr().out


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(linear: torch.nn.Linear) -> torch.nn.Module:
        raise ImportError("No module named 'hqq'")

    monkeypatch.setitem(stored_bases.FORMS, "hqq-4", missing)
    assert stored_bases.main(["--form", "hqq-4", "--threads", "1"]) == 1
    assert capsys.readouterr().out == "hqq-4: left out, No module named 'hqq'\n"
