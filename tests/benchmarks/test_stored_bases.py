"""The benchmark of stored bases: its implementations compute the same, and its record says what."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

from benchmarks import stored_bases
from benchmarks.timing import Budget


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_implementations_compute_the_same(method: str) -> None:
    made = stored_bases.passes("nf4", method, (6, 64, 24), 4, "cpu")
    y = {name: module(made["x"]) for name, module in made["modules"].items()}
    assert (y["dk"] - y["peft"]).abs().max() <= 1e-5 * y["peft"].abs().max()
    assert not torch.equal(y["peft"], y["frozen"])


@pytest.mark.parametrize(("dtype", "kept"), [("fp32", 0.55), ("bf16", 0.35)])
def test_command_writes_a_record(dtype: str, kept: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "stored.json"
    arguments = ["--form", "nf4", "--method", "dora", "--rounds", "3", "--shape", "32", "64", "48", "--rank", "2"]
    arguments += ["--dtype", dtype]
    assert stored_bases.main([*arguments, "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == list(stored_bases.IMPLEMENTATIONS)
    saved, peak = ({row["impl"]: row[name] for row in rows} for name in ("saved_mib", "peak_mib"))
    assert saved["frozen"] < saved["dk"] < saved["peft"]
    assert {row["impl"]: row["saved_to_peft"] for row in rows}["dk"] <= kept
    assert {row["dtype"] for row in rows} == {dtype}
    assert peak["frozen"] < peak["dk"] <= peak["peft"]
    assert [row["ratio_to_peft"] for row in rows if row["impl"] == "peft"] == [1.0]
    assert "kept," in capsys.readouterr().out


@pytest.mark.parametrize(("form", "library"), [("torchao-int8", "torchao"), ("hqq-4", "hqq")])
def test_every_form_is_weighed(form: str, library: str) -> None:
    """A tensor subclass is as many bytes as the tensors that it is made of."""
    pytest.importorskip(library, reason=f"needs {library}: pip install 'delora-kernels[{library}]'")
    budget = Budget(seconds=0, least=3, most=3, warmup=0)
    rows = stored_bases.measure(form, "dora", (32, 64, 48), 2, "cpu", "fp32", budget)
    saved = {row["impl"]: row["saved_mib"] * 2**20 for row in rows}
    assert saved["dk"] == 4 * (32 * 48 + 32 * 2 + 2 * 48)
    assert saved["dk"] < saved["peft"]


def test_what_is_not_installed_is_left_out(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def missing(linear: torch.nn.Linear, device: str) -> torch.nn.Module:
        raise ImportError("No module named 'hqq'")

    monkeypatch.setitem(stored_bases.FORMS, "hqq-4", missing)
    assert stored_bases.main(["--form", "hqq-4", "--threads", "1"]) == 1
    assert capsys.readouterr().out == "hqq-4: left out, No module named 'hqq'\n"
