"""The demo's first table, and that its report comes in time: what is measured first, what is cut,
what is said of it.
"""

import dataclasses
import json
import random
import types
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")
pytest.importorskip("transformers")

import transformers
from matplotlib.figure import Figure

from benchmarks import overhead, timing
from benchmarks.finetune import cli, demo, floor, sizing, text, train
from benchmarks.finetune.floor import Floor, part_of
from benchmarks.finetune.sizing import Cost

MS = {"frozen": 10.0, "lora peft": 14.0, "lora dk": 12.0, "dora peft": 20.0, "dora dk": 12.5}
MS |= {"delora peft": 16.0, "delora dk": 17.5}


def hand_made(noise: Mapping[str, float] | None = None, rounds: int = 20, seed: int = 0) -> Floor:
    """Rounds whose steps take MS, each longer by a part that is drawn below its noise."""
    draw = random.Random(seed)
    times = {
        name: [ms * (1 + (noise or {}).get(name, 0.001) * draw.random()) for _ in range(rounds)]
        for name, ms in MS.items()
    }
    return Floor(times, blocks=3, all_blocks=30, batch_size=1, seq_len=64, threads=1, cost=Cost(1.0, 0.1))


def test_the_floor_comes_first_and_the_parts_are_those_of_the_times(seed: int) -> None:
    table = hand_made(seed=seed)
    cells = table.cells()
    assert [line[0] for line in cells] == [
        "frozen model: floor",
        *(f"{method}, {who}" for method in ("LoRA", "DoRA", "DeLoRA") for who in ("PEFT", "accelerated")),
    ]
    assert cells[0][2:] == ("", "", "")
    for (who, ms, over, *_), expected in zip(cells, MS.values(), strict=True):
        assert float(ms) == pytest.approx(expected, rel=2e-3), who
        assert not over or float(over.split("x")[0]) == pytest.approx(expected / 10.0, rel=5e-3), who
    words = [line[3:] for line in cells]
    assert words[1] == words[3] == words[5] == ("", "")
    for (speed, part), faster, gone in zip(
        words[2::2], ("1.17x faster", "1.60x faster", "1.09x slower"), (50, 75, -25), strict=True
    ):
        assert speed.startswith(faster)
        assert int(part.split("%")[0]) == pytest.approx(gone, abs=1)
    assert "the first 3 of 30 blocks" in table.words()
    rows = json.loads(json.dumps(table.as_json()))["rows"]
    assert [(row["method"], row["impl"]) for row in rows[:3]] == [(None, "frozen"), ("lora", "peft"), ("lora", "dk")]
    assert rows[2]["overhead_gone"] == pytest.approx(0.5, abs=0.01)


def test_what_noise_hides_is_called_so(seed: int) -> None:
    """A speed whose interval holds 1, a part of an overhead that may be none, and few rounds."""
    even = hand_made({"lora peft": 2.0, "lora dk": 2.0}, seed=seed)
    times = {**even.times, "lora dk": even.times["lora peft"][::-1]}
    cells = dataclasses.replace(even, times=times).cells()
    assert cells[2][3].startswith("too noisy: ")
    assert cells[2][4] == "too noisy"
    assert "faster" in cells[4][3]
    hidden = hand_made({"frozen": 4.0}, seed=seed).cells()  # the floor may lie above PEFT's LoRA
    assert "faster" in hidden[2][3]
    assert hidden[2][4] == "too noisy"
    few = hand_made(rounds=sizing.ENOUGH_ROUNDS - 1, seed=seed).cells()
    assert {cell for line in few[2::2] for cell in line[3:]} == {"too few rounds"}


def test_a_part_of_the_model_leaves_the_model_alone(tiny: Path) -> None:
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).requires_grad_(False)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.arange(40).view(2, 20)
    expected = model(input_ids=ids, labels=ids)
    part: Any = part_of(model, 1)
    again = model(input_ids=ids, labels=ids)
    assert torch.equal(again.loss, expected.loss)
    assert torch.equal(again.logits, expected.logits)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert len(part.model.layers) == part.config.num_hidden_layers == 1
    assert part.model.layers[0].mlp.up_proj.weight is model.model.layers[0].mlp.up_proj.weight
    short = model.model(input_ids=ids, output_hidden_states=True).hidden_states[1]
    assert torch.equal(
        part.model(input_ids=ids, output_hidden_states=True).hidden_states[0], model.model.embed_tokens(ids)
    )
    assert torch.equal(part(input_ids=ids).logits, model.lm_head(model.model.norm(short)))


def test_a_part_of_the_vocabulary(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(floor, "VOCABULARY", 250)
    model = transformers.AutoModelForCausalLM.from_pretrained(tiny).requires_grad_(False)
    part: Any = part_of(model, 2)
    ids = torch.arange(40).view(2, 20)
    logits = model(input_ids=ids).logits
    assert logits.shape[-1] == 300
    found = part(input_ids=ids, labels=ids)
    assert torch.allclose(found.logits, logits[..., :250], rtol=1e-5, atol=1e-6)
    assert found.loss.isfinite()
    assert not any(p.requires_grad for p in part.parameters())


@pytest.mark.parametrize(("slower", "blocks"), [(0.1, 30), (8.0, 8), (1000.0, 2)])
def test_a_slow_machine_times_fewer_blocks(slower: float, blocks: int) -> None:
    assert sizing.blocks_of(Cost(0.05 * slower, 1.2 / 512 * slower), 30, 90.0) == blocks


@pytest.mark.parametrize("slower", [0.01, 1.0, 8.0, 1000.0])
def test_the_table_has_rounds_before_tokens(slower: float) -> None:
    wanted = dataclasses.replace(settings(), batch_size=2, seq_len=256)
    cost = Cost(0.05 * slower, 1.2 / 512 * slower)
    short = 12.0 * cost.step(sizing.SHORT)
    batch_size, seq_len, one = sizing.table(wanted, cost, short, 90.0)
    assert one == pytest.approx(12.0 * cost.step(batch_size * seq_len))
    assert (sizing.ROUNDS + 1) * one <= 90.0 or batch_size * seq_len == train.SHORTEST
    assert batch_size * seq_len <= 512
    assert (batch_size, seq_len) == (2, 256) or slower >= 1.0


def settings(*arguments: str) -> Any:
    """The demo's settings on a CPU."""
    return cli._settings(cli._parser().parse_args(["--device", "cpu", "--dtype", "fp32", *arguments]))


@pytest.mark.parametrize(
    ("together", "chosen"),
    [
        ({16: 1.0, 64: 1.2}, 4),  # small operations gain nothing, large ones do
        ({16: 1.0, 64: 2.5}, 1),
        ({16: 20.0}, 1),  # threads that wait for each other: the longer step is not even tried
    ],
)
def test_one_thread_where_others_hold_the_cores(together: dict[int, float], chosen: int) -> None:
    alone = {16: 1.0, 64: 2.0}
    before = torch.get_num_threads()
    config = dataclasses.replace(settings(), most_threads=4)
    try:
        timed = lambda length: (alone if torch.get_num_threads() == 1 else together)[length]  # noqa: E731
        cost = sizing.measure(timed, config)
        assert torch.get_num_threads() == chosen
        assert cost.step(64) == pytest.approx((alone if chosen == 1 else together)[64])
        torch.set_num_threads(2)
        sizing.measure({16: 1.0, 64: 2.0}.__getitem__, dataclasses.replace(config, threads=2))
        assert torch.get_num_threads() == 2, "the user's choice"
    finally:
        torch.set_num_threads(before)


class Machine:
    """A machine in a clock that stands still but for what is told to take time.

    Args:
        slower: Than two idle cores of a server, in fp32.
        busy: From which second on to which neighbours make everything twice as long.
    """

    def __init__(self, slower: float, busy: tuple[float, float] = (0.0, 0.0)) -> None:
        self.now, self.slower, self.busy = 0.0, slower, busy
        self.draw = random.Random(0)

    def spend(self, seconds: float) -> None:
        neighbour = 2.0 if self.busy[0] <= self.now < self.busy[1] else 1.0
        self.now += seconds * self.slower * neighbour * self.draw.uniform(0.9, 1.3)

    def step(self, tokens: int, part: float = 1.0) -> None:
        """A step of SmolLM2-135M, as measured, or of a part of it."""
        self.spend(part * (0.5 + 4.5e-3 * tokens))


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Machine]]:
    """Let the demo run on a Machine; yields what makes it."""

    def made(*arguments: Any) -> Machine:
        it = Machine(*arguments)
        clock = types.SimpleNamespace(monotonic=lambda: it.now, perf_counter=lambda: it.now)
        for module in (demo, floor, sizing, train, timing):
            monkeypatch.setattr(module, "time", clock)

        def loss_of(run: train.Run, batch: torch.Tensor, config: Any) -> torch.Tensor:
            it.step(batch.numel(), 0.4)
            loss = 5.0 + run.trained[-1].square().sum()
            if loss.requires_grad:
                loss.register_hook(lambda _: it.step(batch.numel(), 0.6))
            return loss

        part = {1: 0.0, 2: 1.0}  # of the real model's blocks that the tiny model's blocks stand for

        def blocks_of(*given: Any, whole: Any = sizing.blocks_of) -> int:
            blocks = whole(given[0], 30, given[2])
            part[1] = blocks / 30
            return 2 if blocks == 30 else 1

        def taken(step: overhead.Step) -> torch.Tensor:
            of_all = part[len(floor._blocks(step.model))]
            it.step(step.tokens.numel(), 0.7 * of_all + 0.3 * of_all * (step.optimizer is not None))
            return torch.zeros(())

        monkeypatch.setattr(train, "loss_of", loss_of)
        monkeypatch.setattr(sizing, "loss_of", loss_of)
        monkeypatch.setattr(sizing, "blocks_of", blocks_of)
        monkeypatch.setattr(overhead.Step, "__call__", taken)
        monkeypatch.setattr(demo, "_tokens", lambda *given, whole=demo._tokens: (it.spend(0.7), whole(*given))[1])
        monkeypatch.setattr(demo, "write", lambda result, whole=demo.write: (it.spend(1.2), whole(result)))
        monkeypatch.setattr(demo.model, "load", lambda *given, whole=demo.model.load: (it.spend(1.0), whole(*given))[1])
        return it

    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    monkeypatch.setattr(text, "documents", lambda files, whole=text.documents: whole(files)[:25])
    threads = torch.get_num_threads()
    yield made
    torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("slower", "busy"),
    [(1.0, (0.0, 0.0)), (8.0, (0.0, 0.0)), (2.0, (150.0, 400.0))],
    ids=["as usual", "eight times slower", "a neighbour comes"],
)
def test_the_report_comes_within_five_minutes(
    machine: Any, tiny: Path, tmp_path: Path, slower: float, busy: tuple[float, float], capsys: Any
) -> None:
    it = machine(slower, busy)
    config = settings("--model", str(tiny), "--rank", "4", "--out", str(tmp_path / "out"))
    assert config.sized
    it.spend(10.0)  # Python and the packages
    demo.run(dataclasses.replace(config, threads=1), began=0.0)
    assert it.now <= 300.0
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["complete"] or report["steps"] >= 10
    assert report["steps"] >= sizing.LEAST_STEPS
    assert report["floor"]["rows"][0]["impl"] == "frozen"
    assert report["floor"]["rounds"] >= sizing.ENOUGH_ROUNDS
    printed = capsys.readouterr().out
    assert (
        0
        < printed.index("What adapters cost")
        < printed.index("frozen model: floor")
        < printed.index("held-out loss after")
    )
    written = (tmp_path / "out" / "report.md").read_text()
    assert (
        0 < written.index("frozen model: floor") < written.index("| LoRA, PEFT") < written.index("held-out loss after")
    )


def test_a_run_that_hurries_sees_fewer_tokens_not_fewer_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of ten seconds, and time for five of them: sequences are cut, the further run stays
    behind.
    """
    it = Machine(1.0)
    monkeypatch.setattr(train, "time", types.SimpleNamespace(monotonic=lambda: it.now))
    seen: list[tuple[str, int]] = []

    def step(run: str, batch: torch.Tensor, lr: float, config: Any) -> None:
        it.now += 5.0 * batch.numel() / 64
        seen.append((run, batch.numel()))

    monkeypatch.setattr(train, "step", step)
    config = dataclasses.replace(settings(), steps=30, seq_len=64, yardstick=30)
    stream = iter([torch.zeros(1, 64, dtype=torch.int64)] * 30)
    done = list(train.race(("a", "b"), ("extra",), stream, config, deadline=50.0, least=10))  # type: ignore[arg-type]
    tokens = [number for run, number in seen if run == "a"]
    assert len(done) == len(tokens) >= 10
    assert it.now <= 50.0
    assert tokens[0] == 64 > tokens[-1] >= train.SHORTEST
    assert tokens == sorted(tokens, reverse=True)
    assert sum(run == "extra" for run, _ in seen) < len(done)
