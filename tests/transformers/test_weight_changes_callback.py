"""WeightChangesCallback: what a Trainer's run leaves in it and in the log is what weight_changes
says at those steps; full fine-tuning against the start.
"""

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from tiny_llama import base, llama
from trainers import trainer

import delora_kernels as dk

torch.set_num_threads(1)

pytestmark = pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning")


def test_adapters_are_measured_at_steps_and_at_the_end(tmp_path: Path, seed: int) -> None:
    model = llama("dora", seed, blocks=1)
    callback = dk.WeightChangesCallback(every=3)
    run = trainer(tmp_path, model, seed, [dk.AccelerateCallback(), callback])
    run.train()
    changes: Any = callback.changes
    assert changes.steps == (3, 4)
    assert len(changes.rows) == 14
    assert not changes.left
    last = dk.weight_changes(model, step=4)
    assert changes.rows[7:] == last.rows
    assert changes.rows[0].update_norm != last.rows[0].update_norm
    logged = {entry["step"]: entry for entry in run.state.log_history if "weights/direction" in entry}
    assert set(logged) == {3}
    first = changes.rows[:7]
    assert logged[3]["weights/direction"] == pytest.approx(sum(row.direction for row in first) / 7)
    assert logged[3]["weights/update"] == pytest.approx(sum(row.update for row in first) / 7)
    assert not any(parameter.grad_fn for parameter in model.parameters())


def test_full_fine_tuning_is_measured_from_its_start(tmp_path: Path, seed: int) -> None:
    model = base(seed, blocks=1)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    callback = dk.WeightChangesCallback(every=4)
    trainer(tmp_path, model, seed, [callback]).train()
    changes: Any = callback.changes
    assert changes == dk.weight_changes(model, since=start, step=4)
    assert {row.name.rpartition(".")[2] for row in changes.rows} >= {"q_proj", "down_proj", "embed_tokens", "lm_head"}
    assert all(row.update > 0 for row in changes.rows)
    assert callback._start is None


def test_without_anything_to_measure_it_says_so(tmp_path: Path, caplog: Any) -> None:
    callback = dk.WeightChangesCallback(keep_start=False)
    with caplog.at_level(logging.WARNING):
        trainer(tmp_path, base(0, blocks=1), 0, [callback], max_steps=1).train()
    assert "the model has no adapters and keep_start is off" in caplog.text
    assert callback.changes is None


@pytest.mark.parametrize(
    ("kind", "text", "arguments"),
    [
        (TypeError, "every must be an int, got float", {"every": 1.0}),
        (ValueError, "every must be 1 or more, got 0", {"every": 0}),
        (TypeError, "keep_start must be a bool or None, got int", {"keep_start": 1}),
        (ValueError, "axis must be one of", {"axis": "both"}),
    ],
)
def test_errors_name_the_argument(kind: Any, text: str, arguments: Any) -> None:
    with pytest.raises(kind, match=f"WeightChangesCallback: {text}"):
        dk.WeightChangesCallback(**arguments)
