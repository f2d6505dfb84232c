"""The overhead benchmark: its rivals compute what PEFT's model does, and its figures are what they
say.
"""

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from benchmarks import overhead
from benchmarks.model_cases import SMALL, ModelCase
from benchmarks.whole_model import adapted

SIZES: dict[str, Any] = SMALL | {"hidden": 24, "intermediate": 40, "heads": 3, "kv_heads": 1, "vocabulary": 64}
SIZES |= {"blocks": 2, "batch": 2, "sequence": 8, "r": 4, "limit_mib": None}


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_rivals_take_the_same_step(method: str) -> None:
    """In float64: the loss and every gradient of the bare Functions and of ours are PEFT's; frozen
    has none.
    """
    case = ModelCase(method, precision="fp32", **SIZES)
    base = adapted(case, "cpu", case.blocks).double()
    found: dict[str, dict[str, torch.Tensor]] = {}
    for name in overhead.IMPLEMENTATIONS:
        step = overhead.Step(base, method, name, overhead.random_tokens(case, "cpu"))
        loss = step()
        grads = {key: p.grad for key, p in step.model.named_parameters() if p.grad is not None}
        found[name] = {"loss": loss.detach()} | grads
    assert set(found["frozen"]) == {"loss"}
    assert found["frozen"]["loss"] != found["peft"]["loss"]
    assert len(found["peft"]) > 14
    for name in ("addmm", "dk"):
        assert found[name].keys() == found["peft"].keys()
        for key, expected in found["peft"].items():
            assert (found[name][key] - expected).abs().max() <= 1e-10 * expected.abs().max().clamp(min=1e-6), key


def test_figures(seed: int) -> None:
    """Half of the overhead is gone; the interval holds that, is narrow where rounds agree, and wide
    where not.
    """
    draw = random.Random(seed)
    widths = []
    for noise in (0.001, 0.3):
        times = {
            name: [ms * (1 + noise * draw.random()) for _ in range(30)]
            for name, ms in (("frozen", 10.0), ("peft", 14.0), ("dk", 12.0))
        }
        found, low, high = overhead.interval(lambda spent: overhead.gone(spent, "dk"), times, seed)
        assert low <= found <= high
        widths.append(high - low)
        if noise < 0.01:
            assert abs(found - 0.5) < 0.01
    assert widths[0] < 0.01 < widths[1]


def test_command_writes_a_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(overhead, "SMALL", SIZES)
    out = tmp_path / "runs" / "overhead.json"
    arguments = [
        "--blocks",
        "1",
        "--batch",
        "1",
        "--sequence",
        "8",
        "--rounds",
        "2",
        "--method",
        "lora",
        "--threads",
        "1",
    ]
    assert overhead.main([*arguments, "--device", "cpu", "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == [*overhead.IMPLEMENTATIONS, overhead.ARITHMETIC]
    assert rows[0]["ratio_to_frozen"] == 1
    assert [row["overhead_gone"] is None for row in rows] == [True, True, False, False, False]
    assert [row["host_us"] is None for row in rows] == [False, False, False, False, True]
    assert all(row["host_us"] is None or row["host_us"] > 0 for row in rows)
    assert capsys.readouterr().out.count("%") == 9  # a part and its interval, of three


def test_arithmetic_is_what_the_frozen_model_and_the_bare_method_take(monkeypatch: pytest.MonkeyPatch) -> None:
    """The bare frozen products are in the frozen model's time already."""
    spent = {"frozen": 10.0, "peft": 16.0, "addmm": 15.0, "dk": 14.0, "products": 7.0, overhead.ARITHMETIC: 9.0}
    monkeypatch.setattr(overhead, "rounds", lambda passes, *_: {name: [(spent[name], None)] * 3 for name in passes})
    rows = overhead.measure(ModelCase("lora", precision="fp32", **SIZES), "cpu", overhead.Budget())
    assert [row["median_ms"] for row in rows] == [10, 16, 15, 14, 12]
    assert rows[-1]["ratio_to_frozen"] == 1.2
    assert rows[-1]["overhead_gone"] == 1 - 2 / 6
    assert [row["host_us"] for row in rows[:-1]] == [ms * 1e3 / (2 * 7) for ms in (10, 16, 15, 14)]  # two blocks of 7
