"""The quick set's layers under pytest-benchmark, our figures in extra_info, with the ceilings we
hold ourselves to.

    python -m pytest benchmarks/layer --benchmark-json FILE --benchmark-histogram
    python -m pytest benchmarks/layer --benchmark-compare

pytest-benchmark times our pass by itself; `extra_info` has every implementation, interleaved, as
benchmarks.run does.
"""

from typing import Any

import pytest
import torch

from benchmarks.cases import BOTH, Case, cases
from benchmarks.ceilings import half_precision
from benchmarks.layer.measure import measure
from benchmarks.layer.methods import METHODS
from benchmarks.layer.rivals import Layer
from benchmarks.timing import Budget, clock_of

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
CEILING = {"lora": 1.0, "dora": 0.85, "delora": 1.0}
"""Time over PEFT's, forward and backward with dx, without dropout, at the set's largest number of
tokens.
"""
FIGURES = ("median_ms", "ratio_to_frozen", "peak_mib", "saved_mib", "error_to_fp64", "status")


CASES = list(cases("quick", tuple(METHODS), DEVICE, half_precision(DEVICE, clock_of(DEVICE))))


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.key)
def test_layer(case: Case, benchmark: Any) -> None:
    rows = {row["impl"]: row for row in measure(case, DEVICE, clock_of(DEVICE), Budget(seconds=1.0))}
    for impl, row in rows.items():
        benchmark.extra_info[impl] = {name: row[name] for name in FIGURES}
    run = Layer(case, DEVICE).implementation("dk").run

    def whole() -> None:
        run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark.pedantic(whole, rounds=5, warmup_rounds=1)
    assert rows["dk"]["status"] == "ok", rows["dk"]["note"]
    largest = max(other.T for other in CASES if other.method == case.method)
    if case.mode == BOTH and not case.dropout_p and case.T == largest and rows.get("peft", {}).get("median_ms"):
        assert rows["dk"]["median_ms"] <= CEILING[case.method] * rows["peft"]["median_ms"]
