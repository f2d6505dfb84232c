"""Which form a product takes: a table's entry for its device, dtype and class of shapes, else the
default.
"""

import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from benchmarks import tune, tune_tiles
from benchmarks.timing import Budget
from delora_kernels.backends.triton import forms, stages, tables, tuned
from delora_kernels.op_arguments import Branch, Frozen, Masks, RankTerm, Rescaling


def test_a_table_decides_by_device_dtype_and_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(forms.FORMS, ((0, 0), torch.float32, "expand"), {"few narrow short": forms.OWN})
    x = torch.empty(5, 7)
    assert forms.choose("expand", x, 11, 7) == forms.OWN
    assert forms.choose("dx", x, 11, 7) == forms.DEFAULT
    assert forms.choose("expand", x.half(), 11, 7) == forms.DEFAULT
    assert forms.choose("expand", x, 4096, 7) == forms.DEFAULT


def test_classes_do_not_follow_the_token_count() -> None:
    assert len({forms.shape_class(T, 4096, 4096) for T in range(2048, 9000, 7)}) == 1
    assert forms.shape_class(2047, 4096, 4096) != forms.shape_class(2048, 4096, 4096)
    assert forms.shape_class(2048, 4096, 8192) == "many wide long"
    assert forms.shape_class(2047, 4095, 8191) == "few narrow short"
    assert forms.shape_class(1, 4096, 8191) == "few wide short"


def test_each_op_asks_for_the_form_of_its_own_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """y has N columns and sums over K, dx K columns and sums over N."""
    asked: list[Any] = []
    choose = forms.choose
    monkeypatch.setattr(forms, "choose", lambda *a: asked.append((a[0], *a[2:])) or choose(*a))
    T, K, N, R = 5, 7, 6, 3
    x, W, dy, h, A, B = (torch.ones(s) for s in ((T, K), (N, K), (T, N), (T, R), (R, K), (N, R)))
    stages.expand(x, W, None, RankTerm(h, B), Rescaling())
    stages.wants_scaled(x, W)
    stages.input_backward(dy, Frozen(W), Branch(h, A, x, R), Masks())
    assert asked == [("expand", N, K), ("expand", N, K), ("dx", K, N)]


@pytest.mark.parametrize("form", [forms.UPDATE, forms.PREFILL, forms.OWN])
def test_the_form_that_was_chosen_runs(form: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Each form calls its own kernel, and where it can't take a call (wider factors in (c)) the
    next one does.
    """
    calls: list[str] = []
    gemm, update = stages.rank_gemm, stages.STAGES.rank_update
    monkeypatch.setattr(stages, "rank_gemm", lambda *a, **kw: calls.append("rank_gemm") or gemm(*a, **kw))
    spied = replace(stages.STAGES, rank_update=lambda *a, **kw: calls.append("rank_update") or update(*a, **kw))
    monkeypatch.setattr(stages, "STAGES", spied)
    monkeypatch.setattr(forms, "DEFAULT", form)
    generator = torch.Generator().manual_seed(seed)
    x, W, h, B = (torch.randn(size, generator=generator) for size in ((5, 7), (6, 7), (5, 3), (6, 3)))
    expected = x @ W.T + 0.5 * h @ B.T
    for wide in (False, True):
        calls.clear()
        dtype = torch.bfloat16 if wide else torch.float32
        y, _ = stages.expand(x.to(dtype), W.to(dtype), None, RankTerm(h, B, 0.5), Rescaling())
        assert calls == ["rank_gemm" if form == forms.OWN and not wide else "rank_update"]
        assert (y.float() - expected).abs().max() <= (0.05 if wide else 1e-5) * expected.abs().max()


class _Partial:
    """A clock that runs every pass and finds form (c) the fastest in the geometric mean, not in the
    arithmetic one.
    """

    def __init__(self) -> None:
        self.rounds = 0
        self.chosen: list[tuple[str, str]] = []

    def round(self, passes: Mapping[str, Callable[[], None]]) -> dict[str, tuple[float, None]]:
        choose, self.rounds = forms.choose, self.rounds + 1
        with pytest.MonkeyPatch.context() as patch:
            for form, run in passes.items():
                patch.setattr(forms, "choose", lambda *a, f=form: self.chosen.append((f, choose(*a))) or choose(*a))
                run()
        return {form: ((1.0, 100.0)[self.rounds % 2] if form == forms.OWN else 30.0, None) for form in passes}


def test_tune_times_each_form_in_every_class(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where a table has an entry; the class is that of the product: [T, inner] · [inner,
    columns].
    """
    monkeypatch.setattr(tune, "TOKENS", (3, 5))
    monkeypatch.setattr(tune, "LAYERS", ((8, 16),))
    monkeypatch.setattr(forms, "shape_class", lambda T, columns, inner: f"{columns} columns of {inner}")
    for op in ("expand", "dx"):
        monkeypatch.setitem(forms.FORMS, ((0, 0), torch.bfloat16, op), {"16 columns of 8": forms.UPDATE})
        clock = _Partial()
        found = tune.fastest(op, torch.bfloat16, "cpu", clock, Budget(0, 1, 1, 0))
        assert found == {"16 columns of 8": forms.OWN}
        assert {form for form, _ in clock.chosen} == {forms.UPDATE, forms.PREFILL, forms.OWN}
        assert all(form == chosen for form, chosen in clock.chosen)


def test_tune_writes_a_table_that_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "TOKENS", (3, 5))
    monkeypatch.setattr(tune, "LAYERS", ((8, 16), (16, 8)))
    arguments = ["--device", "cpu", "--only", "forms", "--out", str(tmp_path / "tuned.py")]
    assert tune.main(arguments, _Partial(), Budget(0, 1, 1, 0)) == 0
    found: dict[str, Any] = {}
    exec((tmp_path / "tuned.py").read_text(), found)
    assert found["TILES"] == tables.TILES
    assert set(found["FORMS"]) == {((0, 0), dtype, op) for dtype in tune.DTYPES for op in ("expand", "dx")}
    assert all(entries == {"few narrow short": forms.OWN} for entries in found["FORMS"].values())
    assert forms.DEFAULT == forms.PREFILL


class _Tiles:
    """A clock that knows which tiles a pass runs in, by the names of the passes; some do not
    launch.
    """

    def __init__(self, fast: dict[tuple[int, ...], float], broken: tuple[int, ...]) -> None:
        self.fast, self.broken, self.run = fast, str(broken), 0

    def round(self, passes: Mapping[str, Callable[[], None]]) -> dict[str, Any]:
        next(iter(passes.values()))()  # an interpreted pass takes long
        self.run += 1
        times = {str(entry): ms for entry, ms in self.fast.items()}
        return {n: RuntimeError("out of resources") if n == self.broken else (times.get(n, 2.0), None) for n in passes}


def test_tiles_that_are_faster_are_written_and_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The fastest that launches on every product; none where the shipped tiles are as fast but for
    the margin.
    """
    monkeypatch.setattr(tune_tiles, "SIZES", ((17, 20), (5, 36)))
    monkeypatch.setattr(tables, "TILES", {((0, 0), "times_small"): {"64": (1, 2, 3, 4)}, ((9, 0), "dy_sums"): {}})
    shipped = tables.TABLES["row_norm"]["32"]
    fast = {(32, 64, 8, 3): 1.0, (32, 128, 4, 3): 0.5, (64, 256, 32, 4, 4, 128): 1.5, tuple(shipped): 1.01}
    clock = _Tiles(fast, broken=(32, 128, 4, 3))
    arguments = ["--device", "cpu", "--only", "tiles", "--out", str(tmp_path / "tuned.py")]
    assert tune.main(arguments, clock, Budget(0, 1, 1, 0)) == 0
    found: dict[str, Any] = {}
    exec((tmp_path / "tuned.py").read_text(), found)
    assert found["FORMS"] == forms.FORMS
    table = found["TILES"]
    assert table.pop(((9, 0), "dy_sums")) == {}  # another device's are kept
    assert table.pop(((0, 0), tables.GEMM)) == {"pointers": (64, 256, 32, 4, 4, 128)}
    kernels = {name: limits for (capability, name), limits in table.items()}
    assert "32" not in kernels["row_norm"]  # 1.0 over 1.01 is within the margin
    for name in tune_tiles.timed():
        slow = {limit for limit, tile in tables.TABLES[name].items() if tuple(tile) not in fast}
        assert kernels.get(name, {}) == dict.fromkeys(slow, (32, 64, 8, 3))
    monkeypatch.setattr(tables, "TILES", found["TILES"])
    assert tables.tiles("times_small", 64, (0, 0)) == tables.Tiles(32, 64, 8, 3)
    assert tables.tiles("times_small", 64, (8, 0)) == tables.TABLES["times_small"]["64"]
    assert tables.tiles("row_norm", 16, (0, 0)) == shipped
    assert tune.text(tuned.TILES, tuned.FORMS) == Path(tuned.__file__).read_text()


def test_each_launch_runs_in_the_tiles_that_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    """What stands in the table while a pass runs, for every kernel; before and after it is as it
    was.
    """
    before = dict(tables.TILES)
    for name in [*tune_tiles.timed(), tables.GEMM]:
        limit, entry = "pointers", (16, 16, 16, 4, 1, 0)
        if name != tables.GEMM:
            limit, entry = next(iter(tables.TABLES[name])), (16, 16, 4, 1)
        asked: list[Any] = []
        function = "gemm_tiles" if name == tables.GEMM else "tiles"
        module = importlib.import_module(f"delora_kernels.backends.triton.{name.split()[0]}")
        real = getattr(tables, function)
        monkeypatch.setattr(module, function, lambda *a, r=real, to=asked: to.append(r(*a)) or to[-1])
        tune_tiles._in_tiles((0, 0), name, limit, entry, tune_tiles._launch(name, 16, 5, 20, "cpu"))()
        assert {tuple(tile) for tile in asked} == {entry}, name
        assert before == tables.TILES


def test_tune_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
