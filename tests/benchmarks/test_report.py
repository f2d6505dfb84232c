"""What people read of records: README's figures, tables and plots with losses in them, comparisons,
the cost model.
"""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks import model
from benchmarks.cases import REFLECTIONS, Case
from benchmarks.layer.measure import MEASURED
from benchmarks.record import load
from benchmarks.report import readme
from benchmarks.report.__main__ import main
from benchmarks.report.plots import draw
from benchmarks.report.tables import compare, report

ROOT = Path(__file__).parents[2]
MACHINE = {"device": "cpu", "cpu": "Some CPU", "threads": 2, "torch": "2.13", "peft": "0.21", "commit": "abc"}
MACHINE |= {"copy_tbps": 0.01, "gemm_tflops": 0.1, "gemm_tflops_by_dtype": {"fp32": 0.1}}


def row(method: str, impl: str, ratio: float | None, T: int = 64, r: int = 4, **others: Any) -> dict[str, Any]:
    columns = Case(method, "shape", T, 32, 48, r, "fp32").columns()
    times = {"median_ms": ratio and 2 * ratio, "ratio_to_frozen": ratio, "peak_mib": ratio, "saved_mib": 0.5}
    return {"kind": "layer", "impl": impl, **columns, **dict.fromkeys(MEASURED), "status": "ok", **times, **others}


def record(ours: float = 1.2) -> dict[str, Any]:
    rows = [
        row("lora", impl, ratio, T) for T in (64, 128) for impl, ratio in (("frozen", 1.0), ("dk", ours), ("peft", 1.1))
    ]
    rows += [row("lora", "frozen-again", 1.03)]
    rows += [row("lora", "addmm", None, status="out of memory", note="OutOfMemoryError: CUDA")]
    rows += [row("dora", "frozen", 1.0), row("dora", "dk", None, status="failed", note="y is off by 1e-2, limit 1e-6")]
    return {"machine": MACHINE, "rows": rows}


def test_readmes_figures_are_what_the_records_give() -> None:
    """Every block of every page; one without a line between its comments would take the next."""
    blocks = 0
    for page in readme.PAGES:
        text = page.read_text(encoding="utf-8")
        assert text.count("<!-- figures: ") == text.count("<!-- end of figures -->") == len(readme.blocks(text))
        assert readme.written(text, page) == text, "run python -m benchmarks.report --readme"
        blocks += len(readme.blocks(text))
    assert blocks == 7


def test_a_changed_figure_is_put_right() -> None:
    page = readme.ROOT / "docs" / "measurements.md"
    text = page.read_text(encoding="utf-8")
    assert readme.written(text.replace("22.4 (**0.30**)", "20.0 (**0.27**)"), page) == text
    with pytest.raises(ValueError, match="names the figures 'nonsense'"):
        readme.written(text.replace("figures: layer-time", "figures: nonsense"), page)


def test_figures_of_a_comparison_of_methods(tmp_path: Path) -> None:
    """Means over the seeds, the spread, the learning rate of each method."""
    rows = [
        {"method": method, "seed": seed, "lr": 1e-3 / (1 + number), "median_ms": 100.0 + seed, "kept_mib": 20.0}
        | {"heldout_loss": [3.0, 2.5 + 0.1 * seed + number]}
        for number, method in enumerate(["lora", "goat-theory"])
        for seed in range(3)
    ]
    settings = {"methods": ["lora", "goat-theory"], "steps": 60, "batch_size": 2, "seq_len": 128, "seeds": 3}
    written = {"machine": MACHINE, "model": "Some", "config": settings | {"rank": 16, "dtype": "fp32"}, "rows": rows}
    (tmp_path / "record.json").write_text(json.dumps(written))
    before = f"Text.\n<!-- figures: methods {tmp_path / 'record.json'} -->\nold\n<!-- end of figures -->\n"
    text = readme.written(before)
    assert "*Some, total rank 16 on every linear, 60 steps of 2 × 128 tokens, 3 seeds, all fp32. Some CPU, 2" in text
    assert "| LoRA | 0.001 | 3.000 → **2.600** (2.500 to 2.700) | 101 | 20 |" in text
    assert "| GOAT, s = √(3ηK/r) | 0.0005 | 3.000 → **3.600** (3.500 to 3.700) | 101 | 20 |" in text
    assert "old" not in text


def test_a_report_shows_losses_refusals_and_noise() -> None:
    text = report(record())
    assert "| LoRA | shape | 64, 32 → 48, 4 | fp32 | 2 | **1.20** (2.4) | 1.10 (2.2) | out of memory |" in text
    assert "| DoRA | shape | 64, 32 → 48, 4 | fp32 | 2 | failed |  |  |" in text
    assert "| failed | dk | 1 | y is off by 1e-2, limit 1e-6 |" in text
    assert "differs by 3.0%" in text
    assert "Some CPU, 2 threads, torch 2.13, PEFT 0.21, commit abc" in text


def test_a_busy_machine_is_called_so() -> None:
    """The same frozen linear, 31 ms in one case and 99 in another, contradicts a small noise within
    the rounds.
    """
    for longest, busy in ((31.0 * 1.49, False), (99.0, True)):
        rows = [each | {"median_ms": 31.0} for each in (row("lora", "frozen", 1.0), row("lora", "frozen-again", 1.03))]
        rows += [
            row("dora", "frozen", 1.0) | {"median_ms": longest},
            row("dora", "frozen", 1.0, T=32) | {"median_ms": 9.0},
        ]
        text = report(record() | {"rows": rows})
        assert ("**The machine was busy**" in text) == busy
        assert "3.0%" in text
        assert ("took 31 to 99 ms" in text) == busy
        assert ("Noise: the frozen linear" in text) != busy


def test_mixtures_are_held_to_what_they_must_show() -> None:
    """r=4 costs 1.3 / 1.2 of its LoRA and 1.3 / 1.22 of r=16: one limit passed, one kept."""

    def of(r: int, ours: float) -> list[dict[str, Any]]:
        ratios = {"frozen": 1.0, "dk": ours, "lora": 1.2, "goat-eager": 2.6}
        return [row("goat", impl, ratio, r=r, E=8, k=2) for impl, ratio in ratios.items()]

    text = report({"machine": MACHINE, "rows": [*record()["rows"], *of(4, 1.26), *of(16, 1.19), *of(1, 1.36)]})
    assert "| GOAT | 64, 32 → 48, 4, E=8, k=2 | fp32 | 1.05 | 1.06 (> 1.05) | 2.06 |" in text
    assert "| GOAT | 64, 32 → 48, 16, E=8, k=2 | fp32 | 0.99 |  | 2.18 |" in text
    assert "| GOAT | 64, 32 → 48, 1, E=8, k=2 | fp32 | 1.13 (> 1.10) | 1.14 (> 1.05) | 1.91 |" in text
    assert "| GOAT | shape | 64, 32 → 48, 4, E=8, k=2 | fp32 | 2 | **1.26** (2.52)" in text
    assert "Mixtures" not in report(record())


REFLECTED = {"n_blocks": 1, "r": 0, "T": 1024, "K": 2048, "N": 2048}


def reflected(method: str, ours: float, authors: float | None, kept: float, **others: Any) -> list[dict[str, Any]]:
    ratios = {"frozen": 1.0, "dk": ours, "authors": authors}
    wanted = REFLECTED | others
    return [row(method, impl, ratio, **wanted) | {"saved_mib": kept} for impl, ratio in ratios.items()]


def test_reflections_are_held_to_what_they_must_show() -> None:
    """3.00 / 1.50 of the authors' form and 8 MiB, one [T, N], are enough, 2.55 / 1.50 and 8.1 MiB
    are not.
    """
    rows = reflected("ether", 1.5, 3.0, 0.0) + reflected("ether-plus-both", 1.5, 2.55, 8.1)
    text = report({"machine": MACHINE, "rows": [*rows, *reflected("ether-both", 1.5, 1.6, 0.4, T=100)]})
    assert "| ETHER | 1024, 2048 → 2048, n=1 | fp32 | 1.50 | 2.00 | 0.00 | 0.00 |" in text
    assert "| ETHER+, both sides | 1024, 2048 → 2048, n=1 | fp32 | 1.50 | 1.70 (< 1.80) | 8.10 (> 8.03) |" in text
    assert "| ETHER, both sides | 100, 2048 → 2048, n=1 | fp32 | 1.50 | 1.07 | 0.40 | 0.40 |" in text
    assert "**3 of 5 limits kept.**" in text
    assert "ETHER and ETHER+" not in report(record())


def test_reflections_on_a_gpu_are_held_to_the_frozen_linear() -> None:
    gpu = MACHINE | {"device": "Some GPU"}
    sizes = {"T": 8192, "K": 4096, "N": 4096}
    rows = reflected("ether", 1.16, 3.0, 0.0, **sizes) + reflected("ether-plus-both", 1.30, None, 128.0, **sizes)
    text = report({"machine": gpu, "rows": [*rows, *reflected("ether-plus", 2.0, 3.0, 0.0, **sizes)]})
    assert "| ETHER | 8192, 4096 → 4096, n=1 | fp32 | 1.16 (> 1.15) | 2.59 |" in text
    assert "| ETHER+, both sides | 8192, 4096 → 4096, n=1 | fp32 | 1.30 |  | 128.00 |  |" in text
    assert "**4 of 5 limits kept.**" in text


def test_readmes_sentence_on_reflections(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(readme, "ROOT", tmp_path)
    rows = reflected("ether", 1.5, 3.0, 0.0) + reflected("ether-both", 1.6, 1.7, 0.0, T=100)
    path = tmp_path / "record.json"
    path.write_text(json.dumps({"machine": MACHINE, "rows": rows + reflected("ether-plus", 1.75, None, 0.0)}))
    assert readme.layer_reflections(path) == (
        "On Some CPU, 2 threads, all fp32, T=1024, K=2048, N=2048, forward + backward over the frozen linear: "
        "ETHER 1.50 (the authors' form 3.00); ETHER+ 1.75 ([record](record.json))."
    )


def test_a_comparison_names_what_became_slower() -> None:
    text = compare(record(1.2), record(1.5))
    assert "2 of 2 slower by more than 5%, 0 faster" in text
    assert "| 1.20 | 1.50 | 1.25 | slower |" in text
    assert "0 of 2 slower by more than 5%, 2 faster" in compare(record(1.5), record(1.2))
    assert "share no case" in compare({"machine": MACHINE, "rows": []}, record())


def test_plots_of_what_a_record_has() -> None:
    drawn = draw(record())
    assert drawn.keys() == {"time", "memory", "scaling", "roofline"}
    lora = drawn["time"].axes[0]
    assert [round(patch.get_height(), 3) for patch in lora.patches] == [1.2, 1.1]
    assert [text.get_text() for text in lora.texts] == ["1.20", "1.10"]
    lines = [list(line.get_ydata()) for line in drawn["scaling"].axes[0].lines if len(line.get_xdata()) == 2]
    assert [1.2, 1.2] in lines


def test_mixtures_and_reflections_have_plots_of_their_own(tmp_path: Path) -> None:
    """A rival without memory is there in words, and a series in n is drawn."""
    rows = reflected("ether", 1.5, None, 1.0) + reflected("ether", 1.25, 3.0, 1.0, n_blocks=4)
    rows[2] |= {"status": "out of memory"}
    rows += reflected("ether-plus", 1.4, 2.8, 1.0)  # n=1 is what most share
    rows += [row("goat", impl, ratio, E=8, k=2) for impl, ratio in (("frozen", 1.0), ("dk", 1.3), ("goat-eager", 2.6))]
    drawn = draw({"machine": MACHINE, "rows": record()["rows"] + rows})
    assert drawn.keys() >= {"time", "time-mixtures", "time-reflections", "scaling-reflections"}
    assert "scaling-mixtures" not in drawn
    ether, ether_plus = drawn["time-reflections"].axes
    assert [text.get_text() for text in ether.texts] == ["1.50", " out of memory"]
    assert [text.get_text() for text in ether_plus.texts] == ["1.40", "2.80"]
    scaling = drawn["scaling-reflections"].axes[0]
    assert list(scaling.lines[0].get_xydata().ravel()) == [1, 1.5, 4, 1.25]
    assert scaling.get_xlabel() == "n, blocks of a side"
    for name, figure in drawn.items():
        figure.savefig(tmp_path / f"{name}.png")


RECORDS = sorted((ROOT / "benchmarks/results").rglob("????-??-??-????????????.json"))
LEAST, *_, LARGEST = sorted(RECORDS, key=lambda path: path.stat().st_size)


@pytest.mark.parametrize("path", RECORDS, ids=lambda p: p.name)
def test_every_committed_record_can_be_shown(
    path: Path, tmp_path: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of all but one record the plots are drawn without savefig, which draws a figure twice more,
    to lay it out; of all but two only those of times, the others are made and left.
    """
    if path != LEAST:

        def save(figure: Figure, name: Path, dpi: int) -> None:
            assert figure.axes
            if path != LARGEST and not name.stem.startswith("time"):
                return
            figure.set_layout_engine("none")
            figure.set_dpi(dpi)
            FigureCanvasAgg(figure).print_png(name)

        monkeypatch.setattr(Figure, "savefig", save)
    assert main([str(path), "--out", str(tmp_path)]) == 0
    plots = list(tmp_path.glob("time*.png"))
    assert plots
    assert all(plot.stat().st_size > 10_000 for plot in plots)
    assert load(path)["machine"]["commit"] in capsys.readouterr().out


def test_without_matplotlib_there_are_tables(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setitem(sys.modules, "benchmarks.report.plots", None)
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record()))
    assert main([str(path), "--out", str(tmp_path)]) == 0
    assert "| LoRA | shape | 64, 32 → 48, 4 |" in (tmp_path / "report.md").read_text(encoding="utf-8")
    assert "no plots" in capsys.readouterr().err


def test_a_file_that_is_no_record(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "other.json").write_text("{}")
    assert main([str(tmp_path / "other.json")]) == 2
    assert "is no benchmark record" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "ratio"), [("b", 1.16), ("d", 1.11), ("c", 1.07)])
def test_the_cost_model_is_the_designs_arithmetic(form: str, ratio: float) -> None:
    """348 µs a GEMM and 15.6 µs a pass of 67 MB, T=8192, 4096², r=16: counted by hand, pass by
    pass.
    """
    passes = {"c": 3, "d": 5, "b": 7}[form]
    by_hand = 1 + passes * 15.6 / (2 * 348)
    ceilings = model.Ceilings(copy=2 * 8192 * 4096 / 15.6e-6, gemm=2 * 8192 * 4096**2 / 348e-6)
    bare = ceilings.seconds(model.frozen(8192, 4096, 4096, 2, True))
    ours = ceilings.seconds(model.adapted("lora", 8192, 4096, 4096, 16, 2, True, form))
    # the form with no pass over y pays the rank term's FLOPs instead, forward and in dx
    flops = 2 * 16 / 4096 / 2 if form == "c" else 0.0
    assert ours / bare == pytest.approx(by_hand + flops, rel=1e-3)
    assert ours / bare == pytest.approx(ratio, abs=0.006)


@pytest.mark.parametrize(("form", "passes"), [("b", (4, 3)), ("d", (3, 2)), ("c", (2, 1))])
def test_siblings_read_what_they_share_once(form: str, passes: tuple[int, int]) -> None:
    """q, k, v of 4096 → 4096, 1024, 1024 and a rank too low to count: passes of x, of y and dy
    together, by hand.

    x: for h, for dA, and dx twice, once or not at all; y: dy once, and y twice, once or not at all.
    """
    x, y = 15.6, 15.6 * 1.5
    of_x, of_y = passes
    ceilings = model.Ceilings(copy=2 * 8192 * 4096 / 15.6e-6, gemm=1e30)
    products = [step._replace(bytes=0) for step in model.frozen(8192, 4096, 6144, 2, True)]
    steps = model.siblings(8192, 4096, (4096, 1024, 1024), 16, 2, form)
    rest = [step for step in steps if step.name not in ("x Wᵀ", "dy W")]
    assert len(steps) - len(rest) == 6
    assert sum(step.flops for step in steps if step not in rest) == sum(step.flops for step in products)
    assert 1e6 * ceilings.seconds(rest) == pytest.approx(of_x * x + of_y * y, rel=1e-6)
    adds = model.added_up(8192, 4096, 3, 2)
    assert 1e6 * ceilings.seconds(adds) == pytest.approx(2 * 3 * x, rel=1e-6)


def test_the_model_predicts_what_is_kept(seed: int) -> None:
    from benchmarks.layer.rivals import Layer
    from benchmarks.memory import kept_bytes

    for method in ("lora", "dora", "delora"):
        layer = Layer(Case(method, "", 512, 96, 128, 8, "bf16-autocast"), "cpu", seed)
        kept = kept_bytes(layer.implementation("dk").forward, layer.tensors)
        assert kept == pytest.approx(model.kept_bytes(method, 512, 96, 128, 8, 2), rel=0.05)
    for method in REFLECTIONS:
        layer = Layer(Case(method, "", 512, 96, 128, 0, "bf16-autocast", n_blocks=4), "cpu", seed)
        kept = kept_bytes(layer.implementation("dk").forward, layer.tensors)
        assert kept == model.kept_bytes(method, 512, 96, 128, 0, 2)


@pytest.mark.parametrize(("method", "passes"), [("ether", 5), ("ether-plus-both", 10)])
def test_the_cost_model_counts_the_passes_of_reflections(method: str, passes: int) -> None:
    """Forward a read and a write of what is reflected, backward a read of it and of the gradient
    and a write: by hand.
    """
    ceilings = model.Ceilings(copy=2 * 8192 * 4096 / 15.6e-6, gemm=2 * 8192 * 4096**2 / 348e-6)
    bare = ceilings.seconds(model.frozen(8192, 4096, 4096, 2, True))
    ours = ceilings.seconds(model.adapted(method, 8192, 4096, 4096, 0, 2, True))
    assert ours / bare == pytest.approx(1 + passes * 15.6 / (2 * 348), rel=1e-3)


def test_predicted_linears_of_experts(capsys: pytest.CaptureFixture[str]) -> None:
    """By hand, where bytes bound everything: x, W, y and dy, W, dx; then x, 2 y and 2 dy, x, 2 dx;
    of 4-bit weights half a byte read and two written twice more.
    """
    S, H, N, E = 5 * 2, 32, 16, 4
    x, W, y = S * (H + N), 3 * E * H * N, S * (2 * N + H)
    bare, more, dense = 2 * 2 * (x + W + y), 2 * (4 * x + 4 * y), 2 * 2.5 * W
    sizes = ["--experts", "4", "--top-k", "2", "--T", "5", "--K", "32", "--N", "16", "--r", "1"]
    for words, first in (([], bare), (["--stored-bits", "4"], bare + dense)):
        assert model.main(["--copy-tbps", "1e-9", "--gemm-tflops", "1", *sizes, *words]) == 0
        printed = capsys.readouterr().out
        assert f"frozen {first:.3f} ms, LoRA {first + more:.3f} ms, {(first + more) / first:.3f} over frozen" in printed


def test_measured_over_predicted(tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "record.json"
    path.write_text(json.dumps(record()))
    assert model.main(["--record", str(path)]) == 0
    GEMM = 4 * (64 * 32 + 48 * 32 + 64 * 48) / 1e10 * 1e3  # this small it is bound by its bytes
    assert (
        f"| lora | frozen | 64 | 32 | 48 | 4 | fp32 | forward+backward | 2.000 | {2 * GEMM:.3f} |"
        in capsys.readouterr().out
    )
    assert model.roofline_fraction(record()["rows"][0], MACHINE) == pytest.approx(2 * GEMM / 2.0)
    assert model.main([]) == 2
