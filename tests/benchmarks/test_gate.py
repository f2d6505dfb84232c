"""What a benchmark refuses: a wrong kernel is not timed, a rival without memory is a row, an absent
one says why.
"""

from typing import Any

import pytest
import torch

from benchmarks.cases import BOTH, FORWARD, Case
from benchmarks.layer import rivals
from benchmarks.layer.measure import measure
from benchmarks.timing import Budget, CpuClock
from delora_kernels import backends
from delora_kernels.backends import eager

SIZES = {"T": 65, "K": 48, "N": 40, "r": 4}
BUDGET = Budget(seconds=0, least=3, most=3, warmup=0)


def rows(
    method: str, seed: int, precision: str = "fp32", mode: str = BOTH, dropout_p: float = 0.0, **others: Any
) -> dict[str, dict[str, Any]]:
    case = Case(method, "", **SIZES, precision=precision, mode=mode, dropout_p=dropout_p, **others)
    return {row["impl"]: row for row in measure(case, "cpu", CpuClock(), BUDGET, seed=seed)}


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16-fp32", "bf16"])
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_right_implementations_are_timed(method: str, precision: str, seed: int) -> None:
    measured = rows(method, seed, precision)
    peft = "peft-bf16" if precision == "bf16" else "peft"
    for name in ("frozen", "frozen-again", "dk", peft, "addmm"):
        row = measured[name]
        if name == "addmm" and precision == "bf16-fp32":
            continue  # it rounds float32 factors that eager PyTorch keeps: near the limit, on one side or the other
        assert row["status"] == "ok", row
        assert row["ratio_to_frozen"] == pytest.approx(row["median_ms"] / measured["frozen"]["median_ms"])
        assert row["p20_ms"] <= row["median_ms"] <= row["p80_ms"]
        assert row["peak_mib"] > 0
    assert measured["dk"]["backend"] == "eager"
    errors = measured["dk"]["errors"]
    assert measured["dk"]["error_to_fp64"] == max(errors.values())
    assert 0 < max(error for name, error in errors.items() if name != "dlam") < 0.1  # one number may be off by more
    assert measured["dk-cuda"]["status"] == "absent"
    assert measured["dk-cuda"]["note"] == backends.unavailable("cuda")
    assert "dk itself runs on eager" in measured["dk-eager"]["note"]


@pytest.mark.parametrize(
    ("method", "precision"), [("moe", "fp32"), ("goat", "fp32"), ("goat", "bf16-autocast"), ("goat", "bf16-fp32")]
)
def test_mixtures_and_their_rivals_are_timed(method: str, precision: str, seed: int) -> None:
    measured = rows(method, seed, precision, E=4, k=2)
    for name in ("frozen", "dk", "lora", "goat-eager", "dense"):
        assert measured[name]["status"] == "ok", measured[name]
    assert measured["lora"]["error_to_fp64"] is None
    assert measured["goat-eager"]["saved_mib"] > 2 * measured["dk"]["saved_mib"]
    assert measured["peft"]["status"] == "absent"
    inference = rows(method, seed, precision, FORWARD, E=4, k=2)
    assert {row["status"] for row in inference.values()} == {"ok", "absent"}


@pytest.mark.parametrize("op", ["project_route", "expand_route_backward", "input_backward"])
def test_a_broken_mixture_is_refused(op: str, monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    whole = getattr(eager, op)

    def broken(*args: Any) -> Any:
        result = whole(*args)
        return (1.01 * result[0], *result[1:]) if isinstance(result, tuple) else 1.01 * result

    monkeypatch.setattr(eager, op, broken)
    measured = rows("goat", seed, E=4, k=2)
    assert measured["dk"]["status"] == "failed"
    assert measured["goat-eager"]["status"] == measured["dense"]["status"] == "ok"


def test_the_authors_loop_drops_what_each_expert_sees(seed: int) -> None:
    """With the dropout of their trainers it keeps more for backward than without; the mixture's row
    is timed too.
    """
    kept = {p: rows("goat", seed, dropout_p=p, E=4, k=2) for p in (0.0, 0.5)}
    assert all(measured["dk"]["status"] == "ok" for measured in kept.values())
    assert kept[0.5]["goat-eager"]["saved_mib"] > kept[0.0]["goat-eager"]["saved_mib"]


def test_packages_for_gpus_are_named(seed: int) -> None:
    cases = [Case(method, "", **SIZES, precision="fp32") for method in ("lora", "dora", "delora")]
    named = [set(rivals.Layer(case, "cpu", seed).names()) & {"unsloth", "axolotl"} for case in cases]
    assert named == [{"unsloth", "axolotl"}, {"axolotl"}, set()]
    with pytest.raises(rivals.Absent, match="addmm is their form"):
        rivals.Layer(cases[0], "cpu", seed).implementation("unsloth")


@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_inference_has_a_merged_row_and_keeps_nothing(method: str, seed: int) -> None:
    measured = rows(method, seed, mode=FORWARD)
    assert measured["merged"]["status"] == measured["dk"]["status"] == "ok"
    assert measured["merged"]["saved_mib"] is None
    assert measured["merged"]["peak_mib"] == pytest.approx(measured["frozen"]["peak_mib"])


def test_dropout_is_compared_with_peft_without_it(seed: int) -> None:
    measured = rows("lora", seed, dropout_p=0.1)
    assert measured["dk"]["status"] == measured["peft"]["status"] == measured["peft-no-dropout"]["status"] == "ok"
    assert "addmm" not in measured


@pytest.mark.parametrize(
    ("op", "seen"), [("project", "y"), ("input_backward", "dA"), ("expand_backward", "dA"), ("input_backward", "dx")]
)
@pytest.mark.parametrize("method", ["lora", "dora", "delora"])
def test_a_broken_kernel_is_refused(
    method: str, op: str, seen: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    whole = getattr(eager, op)

    def broken(*args: Any) -> Any:
        result = whole(*args)
        return tuple(1.01 * each for each in result) if isinstance(result, tuple) else 1.01 * result

    monkeypatch.setattr(eager, op, broken)
    measured = rows(method, seed)
    assert measured["dk"]["status"] == "failed"
    assert f"{seen} is off by" in measured["dk"]["note"]
    assert measured["dk"]["median_ms"] is measured["dk"]["ratio_to_frozen"] is None
    assert measured["peft"]["status"] == "ok"
    assert measured["peft"]["median_ms"] > 0


@pytest.mark.parametrize("at", [1, 4])
def test_a_rival_without_memory_is_a_row_and_the_run_goes_on(
    at: int, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    """Out of memory at the gate, and later, while it is timed."""
    calls: list[int] = []
    whole = rivals.addmm

    def greedy(*args: Any) -> Any:
        calls.append(0)
        if len(calls) >= at:
            torch.empty(2**50, dtype=torch.uint8)
        return whole(*args)

    monkeypatch.setattr(rivals, "addmm", greedy)
    measured = rows("lora", seed)
    assert measured["addmm"]["status"] == "out of memory"
    assert measured["addmm"]["median_ms"] is None
    assert measured["dk"]["status"] == "ok"
    assert measured["dk"]["median_ms"] > 0


def test_without_peft_ours_is_the_function(monkeypatch: pytest.MonkeyPatch, seed: int) -> None:
    monkeypatch.setattr(rivals.importlib.util, "find_spec", lambda name: None)
    measured = rows("delora", seed)
    assert measured["dk"]["status"] == "ok"
    assert measured["peft"] | {"note": "PEFT is not installed", "status": "absent"} == measured["peft"]
