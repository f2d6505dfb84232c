"""The benchmark of the 4-bit recipe: PEFT's layers and ours train alike, padded and packed, and its
record says what.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")
pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")

from benchmarks import qlora_recipe
from benchmarks.memory import allocations


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


@pytest.mark.parametrize("checkpointing", ["none", "non-reentrant"])
def test_the_peak_of_a_step_is_below_pefts(checkpointing: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the dense W of a wide MLP is the largest of what lives at the peak: of its two halves
    one is there at a time.
    """
    monkeypatch.setattr("delora_kernels.bases.bitsandbytes_4bit.HALVED", 0)
    made = qlora_recipe.models(qlora_recipe.four_bit_model(48, 1024, 3, 2, "fp32", "cpu"), "lora", checkpointing, 4)
    peaks = {
        name: allocations(partial(qlora_recipe.step_of(made[name], name, "packed", 2, "cpu"), 8)).peak
        for name in ("frozen", "peft", "dk")
    }
    assert peaks["frozen"] < peaks["dk"] < peaks["peft"]


@pytest.mark.parametrize("start", [1, 32, 100, 1000, 10**6])
def test_longest_within(start: int) -> None:
    """Of lines and of parabolas, each found in few steps."""
    for longest in (0, 31, 32, 33, 64, 2000, 4096, 2**17, 10**6):
        for square in (0.0, 0.01):
            tried: list[int] = []

            def peak(length: int, square: float = square, tried: Any = tried) -> float:
                tried.append(length)
                return 500 + 7 * length + square * length**2

            limit = peak(longest) if longest else 500
            tried.clear()
            found = qlora_recipe.longest_within(limit, peak, start)
            assert found == min(longest, 2**17) // 32 * 32
            assert len(tried) == len(set(tried))
            assert len(tried) <= 14


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_command_writes_a_record(dtype: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """In 16 bits under autocast."""
    out = tmp_path / "recipe.json"
    sizes = ["--hidden", "48", "--intermediate", "64", "--heads", "3", "--blocks", "1", "--sequence", "32"]
    how = ["--method", "dora", "--checkpointing", "none", "--batches", "padded", "--accumulate", "1", "--rounds", "1"]
    how += ["--dtype", dtype]
    assert qlora_recipe.main([*sizes, *how, "--limit-mib", "2", "--threads", "1", "--out", str(out)]) == 0
    rows = {row["impl"]: row for row in json.loads(out.read_text())["rows"]}
    assert list(rows) == list(qlora_recipe.IMPLEMENTATIONS)
    assert rows["frozen"]["peak_mib"] < rows["dk"]["peak_mib"] <= rows["peft"]["peak_mib"]
    assert rows["frozen"]["longest_sequence"] >= rows["dk"]["longest_sequence"] >= rows["peft"]["longest_sequence"]
    assert rows["dk"]["optimizer"] == "AdamW8bit"
    shown = capsys.readouterr().out
    assert all(name in shown for name in qlora_recipe.IMPLEMENTATIONS)
