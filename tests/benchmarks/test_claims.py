"""The studies of the papers' claims: the rule of a verdict, the choice of a rate, the record that
goes on, what is measured of the weights, and the page that says no more than its record.
"""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("matplotlib")
pytest.importorskip("peft")

from benchmarks.claims import delora_bound, delora_rate, digits, docstrings, help_topics
from benchmarks.claims.__main__ import main
from benchmarks.claims.claim import missing, study
from benchmarks.claims.claims import CLAIMS
from benchmarks.claims.page import filled
from benchmarks.claims.record import Record
from benchmarks.claims.rows import ROWS, adapted
from benchmarks.claims.rules import (
    CANNOT_TELL,
    DOES_NOT,
    HOLDS,
    SMOKE,
    STUDY,
    Rules,
    censored,
    interval,
    more,
    no_less,
    rate,
)
from benchmarks.claims.sweep import Sweep
from benchmarks.claims.task import Problem, Task
from benchmarks.claims.training import Run, carry_out
from benchmarks.claims.watches import Seen, bound, delta, layers, part_of_bound, relative_norm

RULES = Rules("drawn-1", (1, 2, 3), (101,), 3, 2, 2, (-12, -8, -4), (-4, -2, 0, 2, 4), 4)


def made(curves: dict[str, Callable[[int, int], float]], rules: Rules = RULES) -> Record:
    """A record whose scores are a function of q and the seed; nothing is trained."""
    record = Record(None)
    for row, score in curves.items():
        while wanted := [run for run in Sweep(record, rules, row).runs if run not in record]:
            for run in wanted:
                value = score(run.q, run.seed)
                watched = {"norms": [0.1], "bound": 0.5}
                record.add(run, {"validation": [value], "test": [value], "watched": watched})
    return record


def test_interval_is_students() -> None:
    """By hand: mean 2, standard deviation 1, t of two degrees of freedom 4.303."""
    found = interval([1.0, 2.0, 3.0])
    assert found.mean == 2.0
    assert found.high - 2.0 == pytest.approx(4.303 / math.sqrt(3), rel=1e-12)
    assert 2.0 - found.low == pytest.approx(4.303 / math.sqrt(3), rel=1e-12)
    assert interval([1.0]).low == -math.inf


@pytest.mark.parametrize(
    ("differences", "exceeds", "matches"),
    [
        ([0.30, 0.31, 0.32], HOLDS, HOLDS),
        ([0.01, 0.02, 0.03], DOES_NOT, HOLDS),
        ([0.019, 0.020, 0.021], DOES_NOT, HOLDS),  # above 0, but surely less than counts
        ([0.15, 0.20, 0.25], CANNOT_TELL, HOLDS),  # above 0, and perhaps by what counts
        ([0.0, 0.4, 0.8], CANNOT_TELL, CANNOT_TELL),
        ([-0.30, -0.31, -0.32], DOES_NOT, DOES_NOT),
        ([-0.05, 0.0, 0.05], DOES_NOT, HOLDS),
        ([0.05, 0.20, 0.35], CANNOT_TELL, HOLDS),  # the interval is above -0.25 alone
    ],
)
def test_verdicts_by_hand(differences: list[float], exceeds: str, matches: str) -> None:
    assert more(differences, 0.25) == exceeds
    assert no_less(differences, 0.25) == matches


def test_open_widths_can_only_hide_a_verdict() -> None:
    """What is wider than measured can't be called narrower; a rival that is can't be beaten."""
    assert censored(HOLDS, a_open=True, b_open=False) == HOLDS
    assert censored(DOES_NOT, a_open=True, b_open=False) == CANNOT_TELL
    assert censored(HOLDS, a_open=False, b_open=True) == CANNOT_TELL
    assert censored(DOES_NOT, a_open=False, b_open=True) == DOES_NOT
    assert censored(HOLDS, a_open=True, b_open=True) == CANNOT_TELL


def test_sweep_chooses_on_validation_and_measures_on_test() -> None:
    """A peak at q = -7, which no pilot sees: the centre is -8, the chosen rate -8 or -6 (ties: the
    lower), and the width by hand.
    """
    scores = {-12: 0.5, -10: 0.8, -8: 1.0, -6: 1.0, -4: 0.9}
    record = made({"lora": lambda q, seed: scores[q]})
    sweep = Sweep(record, RULES, "lora")
    assert (sweep.centre, sweep.chosen, sweep.at_edge) == (-8, -8, False)
    # 0.95 lies 3/4 of the way from -10 to -8, and half the way from -6 to -4: from -8.5 to -5
    width, reached = sweep.width(1)
    assert width == pytest.approx(3.5 / 4)
    assert not reached
    assert sweep.at(1, 10.0) == pytest.approx(0.9)
    assert sweep.at(1, 10**0.75) == pytest.approx(0.95)
    assert rate(-8) == pytest.approx(0.01)

    for run in sweep.runs:  # a test score that would choose otherwise is not asked
        record[run]["test"] = [1.0 if run.q == -10 else 0.2]
    again = Sweep(record, RULES, "lora")
    assert (again.chosen, again.test(1)) == (-8, 0.2)


def test_a_rate_outside_the_sweep_tells_nothing() -> None:
    """Best one step before the sweep's last rate: 4x, 2.4 quarter decades on, was never run."""
    record = made({row: lambda q, seed: 1.0 - 0.01 * abs(q + 6) * (1 + 0.1 * seed) for row in delora_rate.METHODS})
    sweep = Sweep(record, RULES, "lora")
    assert (sweep.chosen, sweep.rates[-1], sweep.at_edge) == (-6, -4, False)
    assert sweep.reaches(10**0.5)
    assert not sweep.reaches(4.0)
    assert not sweep.reaches(0.01)
    for factor in (4.0, 0.01):
        with pytest.raises(ValueError, match="factor must lead to a rate of the sweep"):
            sweep.at(1, factor)
    lines = [line for line in delora_rate.lines(record, RULES) if "at 4x" in line.claimed]
    assert len(lines) == 4
    delora = Sweep(record, RULES, delora_rate.DELORA[0]).label
    assert lines[0].verdict == f"{CANNOT_TELL}: 4x is outside the sweep ({delora}, LoRA)"
    assert all(line.verdict.startswith(f"{CANNOT_TELL}: 4x") for line in lines)


@pytest.mark.parametrize("slope", [1, -1])
def test_best_rate_at_an_edge_tells_nothing(slope: int) -> None:
    record = made({row: lambda q, seed: 0.5 + slope * 0.01 * q for row in ("lora", "delora")})
    assert Sweep(record, RULES, "lora").at_edge
    line = next(line for line in delora_rate.lines(record, RULES) if "wider" in line.claimed)
    assert line.verdict.startswith(f"{CANNOT_TELL}: best rate at the edge")


def _peak(width: float, best: float = 1.0) -> Callable[[int, int], float]:
    """A score that falls in both directions from q = -8, the faster the smaller `width`."""
    return lambda q, seed: best - abs(q + 8) / width * (1 + 0.01 * seed)


def test_a_verdict_changes_with_its_record() -> None:
    """Wide DeLoRA, narrow LoRA: holds; the curves exchanged: does not; half of the runs: can't
    tell.
    """
    curves = {row: _peak(20.0) for row in delora_rate.METHODS}

    def verdict(record: Record) -> str:
        return next(line.verdict for line in delora_rate.lines(record, RULES) if "wider" in line.claimed)

    assert verdict(made(curves | {"delora": _peak(60.0)})) == HOLDS
    assert verdict(made(curves | {"lora": _peak(60.0)})) == DOES_NOT
    assert verdict(made({"delora": _peak(60.0)})) == f"{CANNOT_TELL}: incomplete (LoRA)"
    lines = delora_rate.lines(made(curves | {"delora": _peak(60.0, 0.9)}), RULES)
    assert next(line.verdict for line in lines if "scores no less" in line.claimed) == DOES_NOT


def test_a_broken_bound_shows() -> None:
    record = made({row: _peak(20.0) for row in delora_bound.METHODS})
    assert [line.verdict for line in delora_bound.lines(record, RULES)] == [HOLDS, HOLDS]
    one = Sweep(record, RULES, "delora").runs[3]
    record[one]["watched"]["bound"] = 1.01
    assert [line.verdict for line in delora_bound.lines(record, RULES)] == [DOES_NOT, HOLDS]


@pytest.mark.parametrize("row", [name for name, row in ROWS.items() if "norms" in row.watch and name != "full"])
def test_delta_is_what_the_layer_does(row: str, seed: int) -> None:
    """Against the layer's output on random rows, whose frozen part is computed apart in float64."""
    frozen = digits.smoke(1).model
    model = adapted(row, frozen, 4, seed)
    torch.manual_seed(seed)
    for name, (layer, linear) in layers(Seen(model, frozen, digits.smoke(1))).items():
        with torch.no_grad():
            for parameter in layer.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn_like(parameter))
            x = torch.randn(7, linear.in_features)
            wanted = layer(x).double() - (x.double() @ linear.weight.double().T + linear.bias.double())
        scale = float(wanted.norm() + (x.double() @ linear.weight.double().T).norm())
        got = x.double() @ delta(layer, linear).double().T
        assert float((got - wanted).norm()) <= 64 * torch.finfo(torch.float32).eps * scale, name
    assert relative_norm(Seen(model, frozen, digits.smoke(1))) > 1e-3


@pytest.mark.parametrize("row", ["delora", "delora-paper", "normalised"])
def test_bound_by_hand(row: str, seed: int) -> None:
    """λ max n, n the norms of W's columns (or their mean); equal unit terms reach it where n is one
    number.
    """
    frozen = digits.smoke(1).model
    model = adapted(row, frozen, 4, seed)
    pairs = list(layers(Seen(model, frozen, digits.smoke(1))).values())
    means = [float(linear.weight.norm(dim=0).mean()) for _, linear in pairs]
    for layer, linear in pairs:
        most = sum(means) / len(means) if row == "normalised" else float(linear.weight.norm(dim=0).max())
        assert bound(layer) == pytest.approx((8.0 if row == "delora-paper" else 4.0) * most, rel=1e-6)
    if row == "normalised":
        with torch.no_grad():
            for layer, _ in pairs:
                layer.A.copy_(layer.A[:1].expand_as(layer.A))  # type: ignore[operator, union-attr]
                layer.B.fill_(1.0)  # type: ignore[operator, union-attr]
        assert part_of_bound(Seen(model, frozen, digits.smoke(1))) == pytest.approx(1.0, rel=1e-4)
        with torch.no_grad():
            pairs[0][0].lam.zero_()  # type: ignore[operator, union-attr]
        assert part_of_bound(Seen(model, frozen, digits.smoke(1))) == pytest.approx(1.0, rel=1e-4)  # of the others
        with torch.no_grad():
            pairs[0][0].A.fill_(math.nan)  # type: ignore[operator, union-attr]
        assert part_of_bound(Seen(model, frozen, digits.smoke(1))) == math.inf


@pytest.mark.parametrize("row", sorted(ROWS))
def test_every_method_trains(row: str) -> None:
    """Its loss falls, the frozen model stays as it is, the same run gives the same numbers."""
    frozen = {name: value.clone() for name, value in digits.smoke(1).model.state_dict().items()}
    settings = {"rank": 4, "q": -6, "seed": 1, "steps": 12, "warmup": 2, "marks": (1, 12)}
    run = Run("drawn-1", row, watch=ROWS[row].watch, **settings)
    found = carry_out(run)
    assert found["loss"][1] < found["loss"][0]
    assert all(torch.equal(value, frozen[name]) for name, value in digits.smoke(1).model.state_dict().items())
    if "bound" in run.watch:
        assert 0 < found["watched"]["bound"] <= 1
    if "norms" in run.watch:
        assert 0 < found["watched"]["norms"][0] < found["watched"]["norms"][1]
    if row == "lora":
        again = carry_out(run)
        assert {**found, "step_cpu_ms": 0} == {**again, "step_cpu_ms": 0}
        assert carry_out(replace(run, seed=2))["loss"] != found["loss"]


def test_parts_share_no_image() -> None:
    x = torch.arange(300.0).view(300, 1, 1).expand(300, 8, 8)
    parts = digits.split(3, x, torch.arange(300), (100, 80, 60))
    assert [len(part.x) for part in parts.values()] == [100, 80, 60, 60]
    assert sorted(int(y) for part in parts.values() for y in part.y) == list(range(300))
    assert torch.equal(parts["pretrain"].x[:, 0, 0], parts["pretrain"].y.float())
    corner = torch.zeros(1, 8, 8)
    corner[0, 0, 7] = 1.0  # above right: above left after a quarter turn
    wanted = torch.ones(1, 8, 8)
    wanted[0, 0, 0] = 0.0
    assert torch.equal(digits.shifted(corner), wanted)


def test_digits_are_read_from_the_installed_package() -> None:
    try:
        x, y = digits.images()
    except Problem as problem:
        pytest.skip(str(problem))
    assert x.shape == (1797, 8, 8)
    assert (float(x.min()), float(x.max())) == (0.0, 1.0)
    assert y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_command_goes_on_where_it_was_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ctrl-C after three runs, a line that is cut off: the rest is run, nothing twice; then nothing
    more; the verdicts are printed.
    """
    monkeypatch.setattr(delora_bound, "METHODS", ("delora",))
    file, done = tmp_path / "record.jsonl", []

    def counted(run: Run) -> dict[str, Any]:
        if len(done) == 3:
            done.append(None)
            raise KeyboardInterrupt
        done.append(run)
        return carry_out(run)

    monkeypatch.setattr("benchmarks.claims.claim.carry_out", counted)
    words = ["delora-bound", "--smoke", "--record", str(file)]
    assert main(words) == 130
    with file.open("a") as text:
        text.write('{"run": {"ro')
    assert main(words) == 0
    out = capsys.readouterr().out
    assert HOLDS in out
    runs = [run for run in done if run is not None]
    assert len(runs) == len(set(runs)) == 9
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert [("machine" in line) for line in lines].count(True) == 2
    record = Record(file)
    assert len(record) == 9
    study([CLAIMS["delora-bound"]], record, SMOKE)
    assert len(done) == 10
    assert main(["no-claim"]) == 2
    assert "there are" in capsys.readouterr().err


@pytest.mark.parametrize("words", [[], ["--show"], ["--page"]], ids=["listing", "--show", "--page"])
def test_reading_changes_no_record(words: list[str], tmp_path: Path) -> None:
    """Another process may be about to end the last line."""
    file, page = tmp_path / "record.jsonl", tmp_path / "page.md"
    file.write_bytes(b'{"machine": {}}\n{"run": {"ro')
    page.write_text("no marks")
    words = [*words, *([str(page)] if words == ["--page"] else []), "--smoke", "--record", str(file)]
    assert main(words) == 0
    assert file.read_bytes() == b'{"machine": {}}\n{"run": {"ro'
    assert page.read_text() == "no marks"


@pytest.mark.parametrize("line", ["", "{", "[]", "3", '{"run": {}}'], ids=repr)
def test_a_line_that_is_none_of_a_record(line: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "record.jsonl"
    file.write_text(f'{{"machine": {{}}}}\n{line}\n')
    assert main(["--show", "--record", str(file)]) == 2
    assert capsys.readouterr().err == f"claims: --record {file}: line 2 is no line of a record: remove it\n"


def test_files_that_are_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A folder as a record, to read and to write; a page that is not there, a folder as one."""
    (tmp_path / "file").write_text("")
    for words, text in (
        (["--record", str(tmp_path)], f"--record {tmp_path} can't be read: Is a directory"),
        (["--record", str(tmp_path / "file/in"), "delora-bound"], f"--record {tmp_path / 'file/in'} can't be"),
        (["--page", str(tmp_path / "none.md")], f"--page {tmp_path / 'none.md'} can't be read: No such file"),
        (["--page", str(tmp_path)], f"--page {tmp_path} can't be read: Is a directory"),
    ):
        assert main(["--smoke", "--record", str(tmp_path / "none.jsonl"), *words]) == 2
        error = capsys.readouterr().err
        assert error.startswith(f"claims: {text}")
        assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    for name in ("claims", "page.md"):
        (tmp_path / name).write_text("")  # where the figures would lie
    assert main(["--smoke", "--record", str(tmp_path / "none.jsonl"), "--page", str(tmp_path / "page.md")]) == 2
    assert "page.md or its figures can't be written: File exists" in capsys.readouterr().err


def test_page_says_what_its_record_says() -> None:
    """Tables and marks of docs/claims.md, made anew; each claim has its place, each figure its
    file.
    """
    root = Path(__file__).parents[2]
    page = (root / "docs/claims.md").read_text(encoding="utf-8")
    record = Record(root / "benchmarks/results/cpu-epyc-2c/claims.jsonl")
    assert len(record) > 0
    for name in CLAIMS:
        assert page.count(f"<!-- claim: {name} -->") == 1
    assert filled(page, list(CLAIMS.values()), record, STUDY, root / "docs/claims") == page
    for picture in (root / "docs/claims").glob("*.png"):
        assert f"(claims/{picture.name})" in page


def test_every_claim_is_judged_and_drawn() -> None:
    """Of a record made up for the drawn task: verdicts and a figure of all claims but DoRA's and
    GOAT's, no run left to do.
    """
    record = Record(None)
    for claim in (claim for name, claim in CLAIMS.items() if not name.startswith(("dora", "goat"))):
        while wanted := missing(claim, record, RULES):
            for run in wanted:
                score = _peak(20.0)(run.q, run.seed)
                watched = {"norms": [0.0, 0.1, 0.2], "bound": 0.5, "kept": [1.0], "column_norms": [{"b.0.q": 1.0}]}
                scores = [score] * len(run.marks)
                record.add(run, {"validation": scores, "test": scores, "watched": watched, "step_cpu_ms": 1.0})
        assert all(CANNOT_TELL not in line.verdict or "edge" not in line.verdict for line in claim.lines(record, RULES))
        assert claim.draw(record, RULES) is not None
    assert CLAIMS["delora-long"].lines(record, RULES)[0].verdict == DOES_NOT  # no score is lost by either


def test_a_language_model_is_scored_by_its_next_tokens() -> None:
    """Blocks dealt by the seed, none that one seed chooses on to another's report; loss and score
    against torch's own, rows at a time.
    """
    generator = torch.Generator().manual_seed(7)
    train, held_out = (torch.randint(9, (rows, 1 + 12), generator=generator) for rows in (20, 90))
    held_out[:, 0] = torch.arange(90)  # tells the rows apart
    parts = help_topics.parts(3, train, held_out)
    assert {part: tuple(data.x.shape) for part, data in parts.items()} == {
        "train": (20, 12),
        "validation": (help_topics.VALIDATION, 12),
        "test": (help_topics.TEST, 12),
    }
    other = help_topics.parts(4, train, held_out)
    assert torch.equal(parts["validation"].x, other["validation"].x)
    assert not torch.equal(parts["test"].x, other["test"].x)
    for its in (parts, other):
        dealt = torch.cat([parts["validation"].x[:, 0], its["test"].x[:, 0]])
        assert len(dealt.unique()) == len(dealt)
    for data in parts.values():
        assert torch.equal(data.y[:, :-1], data.x[:, 1:])
    with pytest.raises(Problem, match="hold out 40 blocks, 48 are needed"):
        help_topics.parts(3, train, held_out[:40])
    model = torch.nn.Sequential(torch.nn.Embedding(90, 8), torch.nn.Linear(8, 9))
    parts = {part: data._replace(x=data.x % 9) for part, data in parts.items()}
    parts = {part: data._replace(y=data.y % 9) for part, data in parts.items()}
    logits, wanted = model(parts["test"].x), parts["test"].y
    for at_once in (None, 5, 8):
        task = Task(model, parts, 4, at_once)
        assert task.score(model, "test") == (logits.argmax(-1) == wanted).sum().item() / wanted.numel()
    rows = torch.randint(20, (4,), generator=torch.Generator().manual_seed(5))
    x, y = parts["train"].x[rows], parts["train"].y[rows]
    picked = model(x).log_softmax(-1).gather(-1, y[..., None])
    torch.testing.assert_close(task.loss(model, torch.Generator().manual_seed(5)), -picked.mean())


def test_a_sweep_of_one_rate_has_no_edge() -> None:
    """Its chosen rate is the pilot's best; the pilot's own edge still counts."""
    rules = replace(RULES, offsets=(0,))
    for best, at_edge in ((rules.pilot_rates[1], False), (rules.pilot_rates[-1], True)):
        sweep = Sweep(made({"lora": lambda q, _, best=best: 1 - 0.01 * abs(q - best)}, rules), rules, "lora")
        assert (sweep.complete, sweep.chosen, sweep.at_edge) == (True, best, at_edge)


def test_docstrings_of_this_python_are_enough() -> None:
    """Of one module: each once, on one line."""
    found = docstrings.docstrings("logging")
    assert len(found) == len(set(found)) >= docstrings.EACH
    assert all(len(text) >= docstrings.SHORTEST and "  " not in text for text in found)
