"""The recipe of docs/frameworks.md, with a stand-in of LLaMA-Factory's run_exp."""

import re
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import tiny_llama
import torch
import transformers

ROOT = Path(__file__).parents[2]


def test_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Its model has adapters, cast to float32, before its Trainer is made with the callbacks."""
    reports: list[Any] = []

    def run_exp(args: dict[str, Any] | None = None, callbacks: list[Any] | None = None) -> None:
        model = tiny_llama.llama("dora", seed, blocks=1, dtype=torch.bfloat16)
        for parameter in filter(lambda p: p.requires_grad, model.parameters()):
            parameter.data = parameter.data.to(torch.float32)
        ids = tiny_llama.tokens(seed, 4, 6)
        options = transformers.TrainingArguments(
            str(tmp_path), max_steps=1, report_to=[], use_cpu=True, save_strategy="no", bf16=True
        )
        data = [{"input_ids": row, "labels": row} for row in ids]
        transformers.Trainer(model, options, train_dataset=data, callbacks=callbacks).train()
        reports.extend(callback.report for callback in callbacks or [])

    for name in ("llamafactory", "llamafactory.train", "llamafactory.train.tuner"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    sys.modules["llamafactory.train.tuner"].__dict__["run_exp"] = run_exp
    text = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "llamafactory" in block]
    exec(block, {})
    (report,) = reports
    assert len(report.fused) == 7


def test_the_other_blocks_run(capsys: pytest.CaptureFixture[str]) -> None:
    """The one on models that are not loaded."""
    text = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
    small = "LlamaConfig(hidden_size=32, num_attention_heads=4, num_hidden_layers=1, vocab_size=60)"
    (block,) = [block for block in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "can_accelerate" in block]
    exec(block.replace("LlamaConfig()", small), {})
    assert capsys.readouterr().out.startswith("would fuse 0 of 7 adapter layers, and 7 more are expected")
