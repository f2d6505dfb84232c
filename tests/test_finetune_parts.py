"""The pieces of `make demo`, one by one: text, memory probe, order of the runs, summary, verdict, machine."""

import dataclasses
import math
import os
import types
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import peft

from benchmarks.busy import wait_politely_if_busy
from benchmarks.finetune import text, train
from benchmarks.finetune.config import Config
from benchmarks.finetune.plots import running_mean
from benchmarks.finetune.probe import MIB, kept_mib
from benchmarks.finetune.summary import Result, largest, speed
from benchmarks.finetune.verdict import FACTOR, WINDOW, judge
from benchmarks.machine import machine_info


def test_split_keeps_a_repeated_paragraph_once() -> None:
    paragraphs = [f"paragraph {i}" for i in range(10)]
    train_texts, heldout = text.split(["\n\n".join(paragraphs), "paragraph  9\n\nonly here"])
    assert train_texts == ["\n\n".join(paragraphs[:9]), "only here"]
    assert heldout == ["paragraph 9"]


def test_batches_visit_every_row_once_per_epoch() -> None:
    rows = torch.arange(10).view(10, 1)
    stream, again = (text.batches(rows, 4, seed=1) for _ in range(2))
    seen = torch.cat([next(stream) for _ in range(5)]).flatten().tolist()
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]
    assert torch.equal(next(again).flatten(), torch.tensor(seen[:4]))


def test_spread_is_even() -> None:
    rows = torch.arange(9).view(9, 1)
    assert text.spread(rows, 3).flatten().tolist() == [0, 4, 8]
    assert text.spread(rows, 20) is rows


def test_probe_counts_each_living_storage_once_and_no_parameter() -> None:
    linear = torch.nn.Linear(8, 4, bias=False)
    x = torch.randn(5, 8)

    def forward() -> torch.Tensor:
        linear(torch.randn(100, 8)).square().detach()  # keeps nothing: its graph is gone
        y = linear(x[:3])  # keeps x: a view, so its whole storage, 5 * 8 floats; and the weight, a parameter
        return (y * y).sum()  # keeps y twice: 3 * 4 floats

    assert kept_mib(linear, forward) * MIB == 4 * (5 * 8 + 3 * 4)
    assert linear.weight.grad is None


CONFIG = Config(
    *("lora", None, ()),
    *(1, 3, 2, 1, 1.0, 1, 1.0, 0, "fp32", False, "cpu", None, None, 2, 1, Path("out")),
)


def test_runs_take_turns_in_going_first(monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[tuple[str, float]] = []
    monkeypatch.setattr(train, "step", lambda run, batch, lr, config: order.append((run, lr)))
    stream = iter([torch.zeros(1, 2, dtype=torch.int64)] * 3)
    assert list(train.race(("a", "b"), "extra", stream, CONFIG)) == [1, 2, 3]  # type: ignore[arg-type]
    assert [run for run, _ in order] == ["a", "b", "extra", "b", "a", "extra", "a", "b"]
    assert [lr for run, lr in order if run == "a"] == [0.5, 1.0, 1.0]


def test_only_the_yardstick_is_reordered(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, list[int]]] = []
    monkeypatch.setattr(train, "step", lambda run, batch, *_: seen.append((run, batch.flatten().tolist())))
    config = dataclasses.replace(CONFIG, steps=1, accumulation=3)
    stream = iter([torch.arange(3).view(3, 1)])
    assert list(train.race(("a", "b"), "extra", stream, config)) == [1]  # type: ignore[arg-type]
    assert seen == [("a", [0, 1, 2]), ("b", [0, 1, 2]), ("extra", [2, 1, 0])]


@pytest.mark.parametrize(
    ("batch_size", "parts"),
    [(1, [[3], [2], [1], [0]]), (2, [[3, 1], [2, 0]]), (3, [[5, 2, 4], [1, 3, 0]])],
)
def test_reordered_deals_the_same_rows_to_other_parts(batch_size: int, parts: list[list[int]]) -> None:
    rows = torch.arange(sum(map(len, parts))).view(-1, 1) * torch.ones(1, 5, dtype=torch.int64)
    dealt = train.reordered(rows, batch_size)
    assert [part[:, 0].tolist() for part in dealt.split(batch_size)] == parts
    assert torch.equal(dealt[dealt[:, 0].argsort()], rows)


class Product(torch.nn.Module):
    """A model whose loss is w times the mean of its input."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.ones(()))

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return types.SimpleNamespace(loss=self.w * input_ids.float().mean())


def test_a_step_whose_gradient_overflows_is_skipped_and_counted() -> None:
    run = train.Run("toy", Product(), scaler=torch.amp.GradScaler("cpu", init_scale=2.0**126))
    config = dataclasses.replace(CONFIG, accumulation=2, scaler=True)
    batch = torch.tensor(
        [[5, 5], [7, 7]]
    )  # the gradient of w is 6: times 2**126 it overflows, times 2**125 it does not
    for done, weight in enumerate((1.0, 0.9, 0.8)):
        train.step(run, batch, 0.1, config)
        assert run.trained[0].item() == pytest.approx(weight), "Adam's first steps are as long as the learning rate"
        assert run.losses[done] == pytest.approx(6.0 * (1.0, 1.0, 0.9)[done])
        assert (run.scaler.get_scale(), run.skipped) == (2.0**125, 1)


@pytest.mark.parametrize(
    ("device", "scaler", "dtype"), [("cuda:1", True, "fp16"), ("cuda", False, "bf16"), ("cpu", True, "bf16")]
)
def test_a_scaler_on_a_gpu_means_fp16(device: str, scaler: bool, dtype: str) -> None:
    assert dataclasses.replace(CONFIG, device=device, scaler=scaler).autocast_dtype == dtype


def test_summary_of_hand_made_numbers() -> None:
    eager, fused = (train.Run(name, torch.nn.Linear(1, 1)) for name in ("eager", "fused"))
    eager.step_ms, fused.step_ms = [10.0, 30.0, 8.0, 99.0], [5.0, 10.0, 8.0]  # interrupted in the fourth step
    eager.losses, fused.losses = [3.0, 2.0, 1.0, 9.0], [3.0, 2.5, 0.75]
    config: Any = None
    result = Result(config, "tiny", {}, "", eager, fused)
    assert result.steps == 3
    assert result.speedup() == 2.0, "the median of 2, 3 and 1"
    assert result.differences(fused) == [0.0, 0.5, 0.25]
    assert math.isnan(largest([0.0, math.nan, 1.0]))
    assert running_mean([1.0, 3.0, 5.0], 2) == [1.0, 2.0, 4.0]


@pytest.mark.parametrize(
    ("step_ms", "words"),
    [([10.0] * 4, "too few steps"), ([10.0] * 9, "1.25x faster"), ([6.0] * 9, "1.33x slower")],
)
def test_speed_in_words(step_ms: list[float], words: str) -> None:
    eager, fused = (train.Run(name, torch.nn.Linear(1, 1)) for name in ("eager", "fused"))
    eager.step_ms, fused.step_ms = step_ms, [8.0] * len(step_ms)
    config: Any = None
    result = Result(config, "tiny", {}, "", eager, fused)
    assert speed(result) == words
    if len(step_ms) > 4:
        eager.step_ms = [10.0] * 6 + [20.0] * 3
        assert speed(result) == "machine too busy"


@pytest.mark.parametrize(("load", "policy"), [(0.0, None), (64.0, "PASSIVE")])
def test_threads_sleep_while_they_wait_on_a_busy_machine(
    monkeypatch: pytest.MonkeyPatch, load: float, policy: str | None
) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    wait_politely_if_busy()
    chosen = os.environ.pop("OMP_WAIT_POLICY", None)
    assert chosen == policy
    monkeypatch.setenv("OMP_WAIT_POLICY", "ACTIVE")
    wait_politely_if_busy()
    assert os.environ["OMP_WAIT_POLICY"] == "ACTIVE"


def test_machine_info_names_the_machine() -> None:
    info = machine_info("cpu")
    assert info["device"] == "cpu"
    assert info["torch"] == torch.__version__
    assert info["peft"] == peft.__version__
    assert info["threads"] == torch.get_num_threads()
    assert info["cpu"]
    assert None not in (info["python"], info["transformers"], info["numpy"])


def test_the_verdict_allows_twice_the_mean_and_no_more() -> None:
    reordered = [1.0, 3.0] * 20
    verdict = judge([2.0, 6.0] * 20, reordered)
    assert (verdict.steps, verdict.fused.mean, verdict.reordered.largest) == (40, 4.0, 3.0)
    assert FACTOR == 2.0
    assert verdict.passed
    assert "stay within 2 times" in verdict.words()
    assert not judge([2.0, 6.001] * 20, reordered).passed
    uneven = [1.0] * 180 + [2.0] * WINDOW  # 1.1 on average: here the mean alone decides
    assert judge([2.19] * 200, uneven).passed
    assert not judge([2.21] * 200, uneven).passed
    assert not judge([1e-9] * 40, [0.0] * 40).passed
    assert not judge([math.nan, *reordered[1:]], reordered).passed
    assert not judge(reordered, [math.nan, *reordered[1:]]).passed


def test_the_verdict_sees_curves_that_part_late() -> None:
    reordered = [1.0] * 180 + [2.0] * WINDOW
    late = [0.0] * 180 + [4.5] * WINDOW
    verdict = judge(late, reordered)
    assert verdict.fused.mean < verdict.reordered.mean
    assert (verdict.fused.worst_window, verdict.reordered.worst_window) == pytest.approx((4.5, 2.0))
    assert not verdict.passed
    assert judge(late[:190], reordered).steps == judge(late, reordered[:190]).steps == 190
