"""The benchmark of diffusion models: its implementations compute the same; it writes a record."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import diffusion


@pytest.mark.parametrize("method", diffusion.METHODS)
@pytest.mark.parametrize("shape", [diffusion.Layer(8, 16, 12), diffusion.Layer(36, 8, 8, side=6)])
def test_implementations_compute_the_same(shape: diffusion.Layer, method: str) -> None:
    if shape.side and method == "delora":
        return
    case = diffusion.layer_case(shape, method, 2, "cpu")
    y = {name: case.call(module) for name, module in case.modules.items()}
    assert (y["dk"] - y["peft"]).abs().max() <= 1e-5 * y["peft"].abs().max()
    assert not torch.equal(y["peft"], y["frozen"])
    if shape.side:
        assert all(value.is_contiguous(memory_format=torch.channels_last) for value in y.values())


def test_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(diffusion.LAYERS, "conv-640", diffusion.Layer(64, 8, 8, side=8))
    out = tmp_path / "runs" / "diffusion.json"
    arguments = ["--quick", "--case", "conv-640", "--method", "lora", "--rank", "2", "--threads", "1"]
    assert diffusion.main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == list(diffusion.IMPLEMENTATIONS)
    saved, peak = ({row["impl"]: row[name] for row in rows} for name in ("saved_mib", "peak_mib"))
    assert saved["frozen"] < saved["dk"] <= saved["peft"]
    assert peak["frozen"] < peak["dk"] <= peak["peft"]
    assert "frozen" in capsys.readouterr().out
