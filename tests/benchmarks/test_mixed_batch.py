"""The benchmark of mixed batches: its passes compute the same, and the command writes a record."""

import json
from pathlib import Path

import pytest
import torch

pytest.importorskip("peft")

import delora_kernels as dk
from benchmarks import mixed_batch


def test_passes_give_the_same_gradients() -> None:
    """In float32: x's gradient and an adapter's, of PEFT and ours; the frozen layer has neither."""
    made = [mixed_batch.layer_of(16, 3, 3, "cpu") for _ in range(2)]
    dk.accelerate(made[1], strict=True)
    x, found = torch.randn(6, 4, 16, requires_grad=True), {}
    names = mixed_batch.names_of(3, 6)
    assert sorted(names["unsorted"]) == names["sorted"] == ["0", "0", "1", "1", "2", "2"]
    for name, layer in zip(("peft", "dk"), made, strict=True):
        y = layer(x, adapter_names=names["with base"])
        found[name] = torch.autograd.grad(y.square().sum(), [x, layer.lora_A["1"].weight])
    for ours, theirs in zip(found["dk"], found["peft"], strict=True):
        assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()


def test_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "mixed.json"
    small = ["--adapters", "2", "--samples", "3", "--tokens", "4", "--width", "16", "--rank", "2", "--rounds", "3"]
    assert mixed_batch.main([*small, "--threads", "1", "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["case"] for row in rows] == 2 * ["sorted", "unsorted", "with base"]
    assert all(row["peft_over_frozen"] > 0 for row in rows)
    assert "dk / frozen" in capsys.readouterr().out
