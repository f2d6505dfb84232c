"""The benchmark of small layers: its passes compute the same, and its mean is one of ratios."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from benchmarks import small_layers
from benchmarks.cases import Case


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_passes_give_the_same_gradients(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In float32, whose rounding is the only difference: x's gradient of PEFT, addmm and ours."""
    found: list[torch.Tensor] = []
    made = small_layers.inputs(Case(method, "16x24", T=6, K=16, N=24, r=4, precision="fp32"), "cpu", seed=0)
    x = made["x"]
    monkeypatch.setattr(small_layers, "inputs", lambda *_, **__: made)
    steps = small_layers.passes(Case(method, "16x24", T=6, K=16, N=24, r=4, precision="fp32"), "cpu")
    x.register_hook(lambda dx: found.append(dx.clone()))
    for name in ("peft", "addmm", "dk"):
        steps[name]()
    assert x.grad is None
    for other in found[1:]:
        assert (other - found[0]).abs().max() <= 1e-5 * found[0].abs().max()


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_calls_of_torch(method: str) -> None:
    """No more than a bare autograd Function makes, which computes h again but has no check of a
    norm of 0; the count itself is of the operators alone.
    """
    passes = small_layers.passes(Case(method, "16x24", T=6, K=16, N=24, r=4, precision="fp32"), "cpu")
    calls = {name: small_layers.calls_of_torch(run) for name, run in passes.items()}
    assert calls["dk"] <= calls["addmm"] + (method == "dora")
    assert calls["dk"] < calls["peft"]
    x = torch.zeros(2, 3)
    assert small_layers.calls_of_torch(lambda: (torch.mm(x, x.t()), x.sum(0))) == 3  # type: ignore[arg-type, return-value]


def test_mean_is_geometric_and_leaves_the_smallest_out() -> None:
    rows: list[dict[str, Any]] = [
        {"impl": "dk", **dict(zip("TKN", small_layers.SMALLEST, strict=True)), "ratio_to_addmm": 100.0}
    ]
    rows += [{"impl": "dk", "T": 8, "K": 32, "N": 32, "ratio_to_addmm": ratio} for ratio in (0.5, 2.0, 2.0)]
    rows += [{"impl": "peft", "T": 8, "K": 32, "N": 32, "ratio_to_addmm": 7.0}]
    assert math.isclose(small_layers.geometric_mean(rows), 2 ** (1 / 3))


def test_command_writes_a_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "runs" / "small.json"
    arguments = ["--method", "lora", "--rounds", "3", "--shape", "32", "16", "24", "--threads", "1", "--device", "cpu"]
    assert small_layers.main([*arguments, "--out", str(out)]) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [row["impl"] for row in rows] == 2 * list(small_layers.IMPLEMENTATIONS)
    assert {row["ratio_to_addmm"] for row in rows if row["impl"] == "addmm"} == {1.0}
    assert "geometric mean of dk over addmm" in capsys.readouterr().out
