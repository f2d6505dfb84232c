"""WeightChanges: what weight_changes returns, its correlation, text, numbers and plot, and the
errors that name an argument.
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import peft_models
import pytest
import torch
from torch import nn

import delora_kernels as dk
from delora_kernels.integrations.peft.changes import LayerChange, WeightChanges


def points(rows: list[tuple[str, int, float, float]]) -> WeightChanges:
    made = [LayerChange(name, "lora", (), None, step, m, d, 1.0, 2.0, 1.0, 4, 0) for name, step, d, m in rows]
    return WeightChanges(tuple(made))


def test_correlation_over_layers_and_steps() -> None:
    """Three layers and steps; within a step ΔM falls with ΔD, over the steps both grow."""
    rows = [(f"block.{name}_proj", 10 * s, s + 0.1 * n, s - 0.1 * n) for s in (1, 2, 3) for n, name in enumerate("qkv")]
    changes = points(rows)
    x, y = (torch.tensor([row[i] for row in rows], dtype=torch.float64) for i in (2, 3))
    assert changes.correlation() == pytest.approx(float(torch.corrcoef(torch.stack([x, y]))[0, 1]), rel=1e-12)
    assert changes.correlation("layers") == pytest.approx(-1)
    assert changes.correlation("steps") == pytest.approx(1)
    assert changes.of("q_proj").correlation() == pytest.approx(1)
    assert math.isnan(changes.of("q_proj").correlation("layers"))
    still = WeightChanges((LayerChange("q", "lora", (), None, 0, 0.0, 0.0, 0.0, 2.0, 1.0, 4, 0),))
    assert (still + changes).correlation() == changes.correlation()  # what has not changed is no point
    assert (still + changes).steps == (0, 10, 20, 30)
    with pytest.raises(ValueError, match=r"WeightChanges.correlation: over must be one of"):
        changes.correlation("rows")
    with pytest.raises(ValueError, match="of axis 'output', got input"):
        changes + WeightChanges((), (), "input")


def test_text_table_numbers_and_plot(tmp_path: Path) -> None:
    changes = points([(f"block.{n}_proj", s, s + n, s + n * n) for s in (1, 2) for n in range(3)])
    text = str(changes)
    first, second, columns, *rows = text.splitlines()
    assert first == f"3 weights measured at 2 steps, correlation of ΔD and ΔM {changes.correlation():+.2f}"
    assert (second, len(rows)) == ("  at step 2:", 3)
    assert columns.split() == ["layer", "method", "ΔM", "ΔD", "|ΔW|/|W|", "bound"]
    assert rows[2].split() == ["block.2_proj", "lora", "6", "4", "0.5", "-"]
    assert changes.table().row_count == 3
    found = json.loads(json.dumps(changes.to_dict()))
    assert (found["schema"], found["axis"], found["steps"], len(found["layers"])) == (1, "output", [1, 2], 6)
    assert found["layers"][5] | {"magnitude": 6, "direction": 4, "update": 0.5, "step": 2} == found["layers"][5]
    assert found["correlation"] == {
        "all": changes.correlation(),
        "layers": changes.correlation("layers"),
        "steps": None,
    }
    assert changes.summary() == {"weights/magnitude": 11 / 3, "weights/direction": 3.0, "weights/update": 0.5}
    figure = changes.plot(tmp_path / "changes.png")
    assert (tmp_path / "changes.png").stat().st_size > 10_000
    (axes,) = figure.axes
    drawn = {tuple(each.get_offsets()[0]) for each in axes.collections if len(each.get_offsets())}
    assert drawn == {(row.direction, row.magnitude) for row in changes.rows}
    assert WeightChanges(()).plot().axes[0].get_legend() is None


def bad() -> Iterator[Any]:
    model = peft_models.model("lora", 0)
    yield TypeError, r"weight_changes: model must be a torch.nn.Module, got str", {"model": "model"}
    yield TypeError, r"since must be a mapping of names to tensors, got list", {"model": model, "since": [1]}
    yield TypeError, r"step must be an int or None, got float", {"model": model, "step": 1.0}
    yield ValueError, r"axis must be one of .*, got 'rows'", {"model": model, "axis": "rows"}
    yield ValueError, r"model must be one whose weights have changed", {"model": nn.ReLU()}


@pytest.mark.parametrize("case", range(5))
def test_errors_name_the_argument(case: int) -> None:
    kind, text, arguments = list(bad())[case]
    with pytest.raises(kind, match=text):
        dk.weight_changes(arguments.pop("model"), **arguments)
