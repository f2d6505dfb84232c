"""Time and memory of one layer against PEFT on this CPU, with the ceilings the project holds itself to.

    make bench                                    # or: python -m pytest benchmarks/layer
    make bench ARGS="--record FILE"               # also writes the record that README's tables are made from

pytest-benchmark times the fused pass by itself; what is compared are medians of interleaved runs.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from benchmarks.layer.cases import METHODS, PRECISIONS, Case
from benchmarks.layer.measure import MIB, allocations, interleaved, kept_bytes
from benchmarks.layer.record import Record

TIME_SHAPE = {"T": 1024, "K": 2048, "N": 2048, "r": 16}
MEMORY_SHAPE = {"T": 512, "K": 2048, "N": 5632, "r": 64}
CEILINGS = {
    "bf16-autocast": {"lora": 1.0, "delora": 1.0, "dora": 0.7},
    "bf16-fp32": {"lora": 1.0, "delora": 1.0, "dora": 0.7},
    "fp32": {"lora": 1.0, "delora": 1.0, "dora": 0.85},
}
"""Time over PEFT's, forward and backward with dx, at TIME_SHAPE on two threads."""


@pytest.fixture(scope="module", autouse=True)
def threads() -> Iterator[None]:
    """Two threads, whatever the machine has."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def record(request: pytest.FixtureRequest) -> Iterator[Record]:
    """Rows of this run; written at the end if --record names a file."""
    record = Record()
    yield record
    path = request.config.getoption("--record")
    if path:
        record.write(path)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_time(precision: str, method: str, benchmark: Any, record: Record) -> None:
    case = Case(method, precision, **TIME_SHAPE)
    passes = case.passes()
    times = interleaved(passes, rounds=int(os.environ.get("ROUNDS", "30")))
    benchmark.pedantic(passes["dk"], rounds=5, warmup_rounds=1)
    ratio = times["dk"].median_ms / times["peft"].median_ms
    benchmark.extra_info |= {"over_peft": ratio, "over_frozen": times["dk"].median_ms / times["frozen"].median_ms}
    for impl, spent in times.items():
        record.add(case, impl, times=spent, frozen=times["frozen"])
    assert ratio <= CEILINGS[precision][method]


@pytest.mark.parametrize("method", METHODS)
def test_memory(method: str, benchmark: Any, record: Record) -> None:
    case = Case(method, "bf16-autocast", **MEMORY_SHAPE)
    forwards, passes = case.forwards(), case.passes()
    known = [case.x, *case.layer.parameters(), *case.layer.buffers()]
    for impl in passes:
        weighed = allocations(passes[impl])
        record.add(case, impl, kept=kept_bytes(forwards[impl], known), allocations=weighed)
        benchmark.extra_info[f"{impl}_peak_mib"] = weighed.peak / MIB
    benchmark.pedantic(passes["dk"], rounds=3, warmup_rounds=1)
