"""`python -m benchmarks.method_comparison` on a tiny model: the same batches for all, fresh
adapters for each seed.
"""

import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("gguf")
pytest.importorskip("matplotlib")
pytest.importorskip("rich")
pytest.importorskip("transformers")


from benchmarks.finetune import model
from benchmarks.method_comparison import LABELS, _adapted, _config, _parser, _seeded, main, plot

METHODS = ["lora", "delora", "dora", "goat-alpha", "goat-theory"]


@pytest.fixture(scope="module")
def record(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("record")
    options = {"model": tiny, "seeds": 2, "steps": 3, "seq-len": 32, "rank": 8, "heldout": 4, "lr": 1e-2, "threads": 1}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    files = ["--out", str(folder / "record.json"), "--plot", str(folder / "plot.png")]
    assert main([*words, *files, "--methods", *METHODS]) == 0
    assert (folder / "plot.png").stat().st_size > 1000
    found: dict[str, Any] = json.loads((folder / "record.json").read_text())
    again = ["--record", str(folder / "record.json"), "--plot", str(folder / "again.png")]
    assert main(again) == 0  # shown without running
    assert (folder / "again.png").read_bytes() == (folder / "plot.png").read_bytes()
    return found


def test_record_has_every_run(record: dict[str, Any]) -> None:
    assert [(row["seed"], row["method"]) for row in record["rows"]] == [(s, m) for s in range(2) for m in METHODS]
    for row in record["rows"]:
        assert len(row["losses"]) == len(row["step_ms"]) == 3
        assert row["heldout_loss"][1] < row["heldout_loss"][0]
        assert row["kept_mib"] > 0
        assert ("experts" in row) == row["method"].startswith("goat")
    assert record["machine"]["commit"]
    assert set(METHODS) <= set(LABELS)


def test_methods_start_alike_and_seeds_do_not(record: dict[str, Any]) -> None:
    by = {(row["method"], row["seed"]): row for row in record["rows"]}
    for seed in range(2):
        lora, dora = by["lora", seed], by["dora", seed]
        assert dora["losses"][0] == pytest.approx(lora["losses"][0], abs=1e-5)  # B = 0: both are the base model
        assert by["delora", seed]["heldout_loss"][0] == pytest.approx(lora["heldout_loss"][0], abs=1e-5)
        assert by["goat-alpha", seed]["losses"][0] == pytest.approx(by["goat-theory", seed]["losses"][0], abs=1e-5)
    for method in METHODS:
        assert by[method, 0]["losses"] != by[method, 1]["losses"]
    assert by["lora", 0]["losses"][0] != by["lora", 1]["losses"][0]  # the base model's: other batches
    assert by["lora", 0]["heldout_loss"][0] == by["lora", 1]["heldout_loss"][0]  # the same text
    assert by["goat-theory", 0]["heldout_loss"][0] != by["goat-theory", 1]["heldout_loss"][0]  # another router


def test_total_rank_is_equal(record: dict[str, Any]) -> None:
    """GOAT trains what LoRA does, and a router of 8 rows for each layer."""
    count = {row["method"]: row["trained_parameters"] for row in record["rows"]}
    inputs = 2 * (6 * 32 + 64)  # of q, k, v, o, gate, up and down in two blocks
    assert count["goat-theory"] - count["lora"] == 8 * inputs
    assert [row["lr"] for row in record["rows"]][:5] == [1e-2, 1e-2, 1e-2, 1e-2 / 16, 1e-2]
    assert count["delora"] - count["lora"] == 14  # a λ for each layer
    assert count["goat-alpha"] == count["goat-theory"]


def test_seed_draws_what_is_random_and_nothing_else(tiny: Path) -> None:
    args = _parser().parse_args(["--model", str(tiny), "--rank", "8"])
    drawn = {"lora": "lora_A", "delora": "delora_A", "dora": "lora_A", "goat-alpha": "goat_router"}
    for method, name in drawn.items():
        config = _config(args, method)
        start = _adapted(model.load(model.find(args.model), config)[0], config)
        one, again, other = (dict(_seeded(start, seed).named_parameters()) for seed in (0, 0, 1))
        assert all(one[key].equal(again[key]) for key in one)
        assert {key for key in one if not one[key].equal(other[key])} == {key for key in one if name in key}


def test_plot_of_methods_that_do_not_start_as_the_base_model(record: dict[str, Any]) -> None:
    alone = record | {"config": record["config"] | {"methods": ["goat-alpha"]}}
    alone["rows"] = [row for row in record["rows"] if row["method"] == "goat-alpha"]
    titles = [axes.get_title() for axes in plot(alone).axes]
    assert titles[0] == "held-out loss" != plot(record).axes[0].get_title()
