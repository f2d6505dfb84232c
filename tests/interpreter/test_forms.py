"""Which form a product takes: a table's entry for its device, dtype and class of shapes, else the default."""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from benchmarks import tune
from benchmarks.timing import Budget
from delora_kernels.backends.triton import forms, forms_table, stages


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
    assert forms.shape_class(8192, 4096, 14336) == "many wide long"


@pytest.mark.parametrize("form", [forms.UPDATE, forms.PREFILL, forms.OWN])
def test_the_form_that_was_chosen_runs(form: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    """Each form calls its own kernel, and where it can't take a call (wider factors in (c)) the next one does."""
    calls: list[str] = []
    for name in ("rank_gemm", "rank_update"):
        kernel = getattr(stages, name)
        monkeypatch.setattr(stages, name, lambda *a, n=name, k=kernel, **kw: calls.append(n) or k(*a, **kw))
    monkeypatch.setattr(forms, "DEFAULT", form)
    generator = torch.Generator().manual_seed(seed)
    x, W, h, B = (torch.randn(size, generator=generator) for size in ((5, 7), (6, 7), (5, 3), (6, 3)))
    expected = x @ W.T + 0.5 * h @ B.T
    for wide in (False, True):
        calls.clear()
        dtype = torch.bfloat16 if wide else torch.float32
        y, _ = stages.expand(x.to(dtype), W.to(dtype), None, h, B, 0.5, None, None, False, 0.0, None)
        assert calls == ["rank_gemm" if form == forms.OWN and not wide else "rank_update"]
        assert (y.float() - expected).abs().max() <= (0.05 if wide else 1e-5) * expected.abs().max()


class _Partial:
    """A clock that runs every pass and finds form (c) the fastest."""

    def round(self, passes: Mapping[str, Callable[[], None]]) -> dict[str, tuple[float, None]]:
        for run in passes.values():
            run()
        return {form: (1.0 if form == forms.OWN else 2.0, None) for form in passes}


def test_tune_writes_a_table_that_can_be_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tune, "TOKENS", (3, 5))
    monkeypatch.setattr(tune, "LAYERS", ((8, 16), (16, 8)))
    clock, file = _Partial(), tmp_path / "table.py"
    assert tune.main(["--device", "cpu", "--out", str(file)], clock, Budget(0, 1, 1, 0)) == 0
    found: dict[str, Any] = {}
    exec(file.read_text(), found)
    assert set(found["FORMS"]) == {((0, 0), dtype, op) for dtype in tune.DTYPES for op in ("expand", "dx")}
    assert all(entries == {"few narrow short": forms.OWN} for entries in found["FORMS"].values())
    assert forms.DEFAULT == forms.PREFILL
    assert tune.text({}) == Path(forms_table.__file__).read_text().replace("= {}", "= {\n}")


def test_tune_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert tune.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
