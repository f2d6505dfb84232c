"""The pieces of `make demo`, one by one: text, memory probe, order of the runs, summary, verdict,
machine.
"""

import copy
import dataclasses
import math
import os
import types
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")

import peft
from matplotlib.backends.backend_agg import FigureCanvasAgg

from benchmarks.busy import wait_politely_if_busy
from benchmarks.finetune import plots, sizing, text, train
from benchmarks.finetune.config import Config
from benchmarks.finetune.orders import orders, sum_in_parts
from benchmarks.finetune.plots import running_mean
from benchmarks.finetune.probe import MIB, kept_mib
from benchmarks.finetune.summary import Result, largest, speed
from benchmarks.finetune.verdict import WINDOW, judge
from benchmarks.machine import machine_info
from delora_kernels.testing import relative_error


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
    assert list(train.race(("a", "b"), ("extra",), stream, CONFIG)) == [1, 2, 3]  # type: ignore[arg-type]
    assert [run for run, _ in order] == ["a", "b", "extra", "b", "a", "extra", "a", "b"]
    assert [lr for run, lr in order if run == "a"] == [0.5, 1.0, 1.0]


@pytest.mark.parametrize("least", [1, 2])
def test_the_least_steps_are_taken_whatever_the_time(least: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "step", lambda run, batch, lr, config: None)
    stream = iter([torch.zeros(1, 2, dtype=torch.int64)] * 3)
    done = train.race(("a", "b"), (), stream, CONFIG, deadline=0.0, least=least)  # type: ignore[arg-type]
    assert list(done) == list(range(1, least + 1))


def test_a_run_takes_the_rows_in_its_own_order(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[list[int]] = []
    monkeypatch.setattr(
        train, "loss_of", lambda run, part, config: seen.append(part.flatten().tolist()) or run.model(part).loss
    )
    config = dataclasses.replace(CONFIG, batch_size=2, accumulation=2)
    for order in (None, torch.tensor([3, 0, 2, 1])):
        train.step(train.Run("toy", Product(), order=order), torch.arange(4).view(4, 1), 0.1, config)
    assert seen == [[0, 1], [2, 3], [3, 0], [2, 1]]


@pytest.mark.parametrize(("parts", "part_size", "count"), [(2, 1, 0), (3, 1, 2), (2, 2, 2), (4, 1, 11), (2, 3, 9)])
def test_orders_are_all_that_sum_differently(parts: int, part_size: int, count: int) -> None:
    """The counts by hand: pairings of the first two parts, times orders of the others, less the
    given order.
    """
    found = [order.tolist() for order in orders(parts, part_size)]
    assert len(found) == count
    assert all(sorted(order) == list(range(parts * part_size)) for order in found)


def test_sums_in_parts_differ_by_rounding_alone() -> None:
    """y, dx and dW of a float32 layer all round otherwise, by float32's precision; a 16-bit layer
    is left alone.
    """
    layer = torch.nn.Linear(370, 230)
    parts, exact = copy.deepcopy(layer), copy.deepcopy(layer).double()
    sum_in_parts(parts, 1 / 3)
    x, dy = torch.randn(2, 190, 370), torch.randn(2, 190, 230)
    found = []
    for each in (layer, parts, exact):
        given = x.to(each.weight.dtype, copy=True).requires_grad_()
        y = each(given)
        y.backward(dy.to(y.dtype))
        found.append([y.detach(), given.grad, each.weight.grad, each.bias.grad])
    names = ("y", "dx", "dW", "db")
    for name, plain, other, true in zip(names, *found, strict=True):
        assert relative_error(other, true) <= 2 * relative_error(plain, true) + 1e-7, name
        assert name == "db" or not torch.equal(plain, other), name
    small = torch.nn.Linear(4, 3, dtype=torch.bfloat16)
    sum_in_parts(small, 0.5)
    assert "forward" not in vars(small)


def test_orders_sum_to_different_roundings() -> None:
    x = torch.tensor([1.0, 2.0**-24, 2.0**-24, 1.0, -1.0, 2.0**-23], dtype=torch.float32)
    sums = {tuple(part.sum().item() for part in x[order].split(3)) for order in islice(orders(2, 3), 9)}
    assert len(sums) > 1


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


def test_the_plots_labels_stand_clear_of_its_legends() -> None:
    eager, fused = (train.Run(name, torch.nn.Linear(1, 1)) for name in ("eager", "accelerated"))
    eager.losses = fused.losses = [3.0, 2.0, 1.0]
    eager.step_ms = fused.step_ms = [1.0] * 3
    result = Result(CONFIG, "tiny", {"device": "cpu", "cpu": "Some CPU"}, "", eager, fused)
    figure = plots.loss(result)
    FigureCanvasAgg(figure).draw()
    for axes in figure.axes:
        label, legend = axes.yaxis.label.get_window_extent(), axes.get_legend().get_window_extent()
        assert not label.overlaps(legend), (axes.get_ylabel(), label, legend)
        assert label.height < 0.9 * axes.bbox.height, "in wider fonts too"


@pytest.mark.parametrize(
    ("step_ms", "words"),
    [
        ([10.0] * 4, "too few steps"),
        ([10.0] * 9, "1.25x faster (1.25 to 1.25)"),
        ([6.0] * 9, "1.33x slower (1.33 to 1.33)"),
        ([10.0] * 6 + [20.0] * 3, "1.25x faster (1.25 to 2.50)"),
        ([4.0, 16.0] * 6, "too noisy: 0.50x to 2.00x"),
    ],
)
def test_speed_in_words(step_ms: list[float], words: str) -> None:
    eager, fused = (train.Run(name, torch.nn.Linear(1, 1)) for name in ("eager", "fused"))
    eager.step_ms, fused.step_ms = step_ms, [8.0] * len(step_ms)
    result = Result(CONFIG, "tiny", {"device": "cpu", "cpu": "Some CPU"}, "", eager, fused)
    assert speed(result) == words
    eager.kept_mib = fused.kept_mib = 1.0
    assert result.trusted == ("x faster" in words or "x slower" in words)
    assert len(plots.bars(result).axes) == 1 + result.trusted, "drawn is what the table trusts"


@pytest.mark.parametrize("slower", [0.1, 1.0, 8.0, 40.0, 1000.0])
def test_a_run_is_fitted_to_the_machine(slower: float) -> None:
    """On the README's machine 60 steps of 2 × 256 do not fit into 5 minutes; ten steps remain on
    one that is slower.
    """
    wanted = dataclasses.replace(CONFIG, steps=60, batch_size=2, seq_len=256, yardstick=15, heldout_blocks=16)
    cost, seconds = sizing.Cost(0.05 * slower, 1.2 / 512 * slower), 240.0
    config = sizing.fitted(wanted, cost, seconds)
    step = cost.step(config.tokens_per_step)
    assert 10 <= config.steps <= 60
    takes = (2 * config.steps + 2 + config.yardstick) * step + 4 * config.heldout_blocks * cost.step(config.seq_len) / 2
    if slower <= 8:
        assert takes <= sizing.MARGIN * seconds
        assert config.steps >= sizing.CURVE
    if slower == 0.1:
        assert config == dataclasses.replace(wanted, warmup=config.warmup)
    if slower >= 8:
        assert config.tokens_per_step < wanted.tokens_per_step
    assert config.warmup <= config.steps // 4
    assert config.heldout_blocks >= 1


def test_the_measured_cost_is_that_of_the_steps() -> None:
    seconds = {16: 1.6 + 0.5, 64: 6.4 + 0.5}
    config = dataclasses.replace(CONFIG, threads=torch.get_num_threads())
    cost = sizing.measure(seconds.__getitem__, config)
    assert (cost.fixed, cost.per_token) == pytest.approx((0.5, 0.1))
    assert cost.step(512) == pytest.approx(51.7)
    seconds[64] = 1.5  # a neighbour slept while the longer one ran
    assert sizing.measure(seconds.__getitem__, config).step(512) > 1.5


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


def test_the_verdict_compares_with_the_eager_runs_furthest_apart() -> None:
    eager = [[0.0] * 40, [1.0, 3.0] * 20, [4.0] * 40]  # apart by 2, 4 and 2 on average
    verdict = judge([5.0, 6.999] * 20, eager)  # by 6, 4 and 2
    assert (verdict.steps, verdict.eager_runs) == (40, 3)
    assert dataclasses.astuple(verdict.fused) == pytest.approx((4.0, 4.0, 14 / 3), abs=1e-3)
    assert dataclasses.astuple(verdict.spread) == pytest.approx((4.0, 4.0, 4.0))
    assert verdict.passed
    assert "stay within the spread of 3 eager runs" in verdict.words()
    assert not judge([5.0, 7.001] * 20, eager).passed
    assert not judge([1e-9] * 40, [[0.0] * 40, [0.0] * 40]).passed
    for number in range(3):
        broken = [list(run) for run in eager]
        broken[number][0] = math.nan
        assert not judge([0.5] * 40, broken).passed
    assert not judge([math.nan, *[1.0] * 39], eager).passed


def test_the_verdict_sees_curves_that_part_late() -> None:
    eager = [[0.0] * 200, [1.0] * 180 + [2.0] * WINDOW]
    late = [0.5] * 180 + [5.0] * WINDOW
    verdict = judge(late, eager)
    assert verdict.fused.mean < verdict.spread.mean
    assert (verdict.fused.worst_window, verdict.spread.worst_window) == pytest.approx((4.0, 2.0))
    assert not verdict.passed
    assert judge(late[:190], eager).steps == judge(late, [run[:190] for run in eager]).steps == 190
