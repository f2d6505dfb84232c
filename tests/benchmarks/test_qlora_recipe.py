"""The benchmark of the 4-bit recipe: PEFT's layers and ours train alike, padded and packed, and its
record says what.
"""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

from benchmarks import qlora_recipe


@pytest.fixture(scope="module")
def base() -> Any:
    return qlora_recipe.four_bit_model(48, 64, 3, 2, "fp32", "cpu")


@pytest.mark.parametrize(
    ("method", "checkpointing", "kind"),
    [("lora", "none", "packed"), ("dora", "reentrant", "padded"), ("delora", "non-reentrant", "packed")],
)
def test_models_train_alike(method: str, checkpointing: str, kind: str, base: Any) -> None:
    """Losses of three steps; the 8-bit optimizer rounds its moments alike."""
    made = qlora_recipe.models(base, method, checkpointing, 4)
    steps = {name: qlora_recipe.step_of(made[name], name, kind, 2, "cpu") for name in made}
    losses = {name: [step(12) for _ in range(3)] for name, step in steps.items()}
    torch.testing.assert_close(torch.tensor(losses["dk"]), torch.tensor(losses["peft"]), rtol=1e-5, atol=0)
    assert losses["dk"][2] != losses["dk"][0]
    assert losses["frozen"][2] == losses["frozen"][0]


def test_batches_count_every_token_once() -> None:
    """Padding has neither mask nor label; packed documents begin at position 0."""
    for padded in qlora_recipe.batches("padded", 16, 2, "cpu"):
        assert torch.equal(padded["labels"] == -100, padded["attention_mask"] == 0)
        assert padded["attention_mask"].sum(1).min() >= 8
    for packed in qlora_recipe.batches("packed", 16, 2, "cpu"):
        assert packed["input_ids"].shape == (1, 32)
        assert int((packed["position_ids"] == 0).sum()) == qlora_recipe.DOCUMENTS


def test_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "recipe.json"
    sizes = ["--hidden", "48", "--intermediate", "64", "--heads", "3", "--blocks", "1", "--sequence", "32"]
    how = ["--method", "dora", "--checkpointing", "none", "--batches", "padded", "--accumulate", "1", "--rounds", "1"]
    assert qlora_recipe.main([*sizes, *how, "--limit-mib", "2", "--threads", "1", "--out", str(out)]) == 0
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(qlora_recipe.IMPLEMENTATIONS)
    assert rows["frozen"]["peak_mib"] < rows["dk"]["peak_mib"] <= rows["peft"]["peak_mib"]
    assert rows["frozen"]["longest_sequence"] >= rows["dk"]["longest_sequence"] >= rows["peft"]["longest_sequence"]
    assert rows["dk"]["optimizer"] == "AdamW8bit"
    shown = capsys.readouterr().out
    assert all(name in shown for name in qlora_recipe.IMPLEMENTATIONS)
