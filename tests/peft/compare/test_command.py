"""`python -m delora_kernels compare`: what it prints, also under a launcher; what it refuses."""

import json
from pathlib import Path

import pytest
import tiny_llama
import torch

from delora_kernels.__main__ import main


def test_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], seed: int) -> None:
    made = tiny_llama.llama("lora", seed, blocks=1)
    made.config.save_pretrained(tmp_path / "config alone")
    made.save_pretrained(tmp_path / "adapter")
    arguments = ["compare", "--model", str(tmp_path / "config alone"), "--seq-len", "8", "--steps", "1"]
    arguments += ["--device", "cpu"]
    assert main([*arguments, "--method", "delora", "--rank", "2"]) == 0
    assert "fused 7 of 7 adapter layers (7 delora)" in capsys.readouterr().out
    assert main([*arguments, "--adapter", str(tmp_path / "adapter"), "--autocast", "--checkpointing", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["fused_layers"], found["tokens"]) == (7, 16)
    assert "autocast bfloat16" in found["facts"]["model"]
    assert "r=4" in found["facts"]["model"]


def test_under_a_launcher(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Each rank measures on its own device, and the first one prints."""
    tiny_llama.llama("lora", 0, blocks=1).config.save_pretrained(tmp_path)
    arguments = ["compare", "--model", str(tmp_path), "--seq-len", "4", "--steps", "1", "--device"]
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert main([*arguments, "cpu"]) == 0
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert main([*arguments, "cuda"]) == 2
    assert "--device cuda:1: this machine has 1 CUDA devices" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--model", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--model", "x", "--device", "cuda:9"], "CUDA devices"),
    ],
)
def test_command_line_refuses(arguments: list[str], text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("python -m delora_kernels compare: ")
    assert text in error
