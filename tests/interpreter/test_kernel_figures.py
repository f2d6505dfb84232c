"""benchmarks.kernel_figures: what it says that a pass moves is what is counted, its ratios are what
the clock said.
"""

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 (make test-interpreter)", allow_module_level=True)

from traffic import Traffic

from benchmarks import kernel_figures
from benchmarks.timing import Budget

T, K, N = 96, 56, 72


def test_each_pass_moves_what_it_says() -> None:
    for name, skinny in kernel_figures.skinny_passes(T, K, N, "cpu").items():
        with Traffic({"x": T * K, "y": T * N, "W": N * K}) as traffic:
            skinny.run()
        moved = {tensor: traffic.read[tensor] + traffic.written[tensor] for tensor in ("x", "y", "W")}
        assert moved == {"x": skinny.x, "y": skinny.y, "W": skinny.W}, name


def test_ours_and_the_librarys_are_the_same_products(seed: int) -> None:
    """Each pair of passes that is compared writes tensors of one size, from one frozen GEMM of the
    same size.
    """
    torch.manual_seed(seed)
    passes = kernel_figures.gemms(T, K, N, "cpu")
    for ours, other in kernel_figures.RATIOS:
        results = [passes[name]() for name in (ours, other)]
        first, second = (result[0] if isinstance(result, tuple) else result for result in results)
        assert first.shape == second.shape == ((T, K) if "NN" in ours else (T, N))
    y0 = passes["beta=0"]().float()
    y1 = passes["beta=1"]().float()
    torch.testing.assert_close(y1, 2 * y0, rtol=0.02, atol=0.02 * float(y0.abs().max()))


TIMES = {"own NT": 3.0, "library NT": 2.0, "own NN": 5.0, "library NN": 2.0, "beta=1": 9.0}
"""Milliseconds of a pass; 4 of the others."""


class _Clock:
    """A clock that says TIMES."""

    def round(self, passes: Mapping[str, Callable[[], None]]) -> dict[str, Any]:
        return {name: (TIMES.get(name, 4.0), None) for name in passes}


def test_figures(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(kernel_figures, "TOKENS", T)
    monkeypatch.setattr(kernel_figures, "LAYERS", ((K, N), (N, K)))
    monkeypatch.setattr(kernel_figures, "copy_tbps", lambda device, clock: 1e-6)
    file = tmp_path / "figures.json"
    assert kernel_figures.main(["--device", "cpu", "--json", str(file)], _Clock(), Budget(0, 1, 1, 0)) == 0
    rows = json.loads(file.read_text())
    found = {row["figure"]: row["ratio"] for row in rows if row["K"] == K}
    assert found["own NT / library NT"] == 1.5
    assert found["own NN / library NN"] == 2.5
    assert found["beta=1 / beta=0"] == 2.25
    assert found["update of y"] == pytest.approx(2 * 2 * T * N / 4.0e-3 / 1e12 / 1e-6)
    assert found["row norm"] == pytest.approx(2 * N * K / 4.0e-3 / 1e12 / 1e-6)
    assert "| own NT / library NT | 1.50 (3.000 ms) | 1.50 (3.000 ms) |" in capsys.readouterr().out


def test_it_needs_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    if not torch.cuda.is_available():
        assert kernel_figures.main([]) == 2
        assert "needs a CUDA device" in capsys.readouterr().err
