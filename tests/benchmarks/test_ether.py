"""ETHER and ETHER+ in the layer benchmarks: the authors' form as the rival, what it is judged by,
what both keep.
"""

from typing import Any

import pytest
import torch

from benchmarks.cases import BOTH, FORWARD, REFLECTIONS, Case
from benchmarks.ether_authors import ether_authors
from benchmarks.layer.measure import measure
from benchmarks.timing import Budget, CpuClock
from delora_kernels import reference
from delora_kernels.backends import eager
from delora_kernels.testing import relative_error

T, K, N = 33, 24, 40
BUDGET = Budget(seconds=0, least=2, most=2, warmup=0)


def rows(method: str, seed: int, precision: str = "fp32", n: int = 1, mode: str = BOTH) -> dict[str, dict[str, Any]]:
    case = Case(method, "", T, K, N, 0, precision, mode, n_blocks=n)
    return {row["impl"]: row for row in measure(case, "cpu", CpuClock(), BUDGET, seed=seed)}


@pytest.mark.parametrize("n", [1, 4])
def test_the_rival_is_the_authors_form(n: int, seed: int) -> None:
    torch.manual_seed(seed)
    x, W, u, v = torch.randn(5, 12), torch.randn(8, 12), torch.randn(n, 12 // n), torch.randn(n, 12 // n)
    u_out, v_out = torch.randn(n, 8 // n), torch.randn(n, 8 // n)
    x, W, u, v, u_out, v_out = (t.double() for t in (x, W, u, v, u_out, v_out))
    got, want = ether_authors(x, W, u), reference.ether_linear(x, W, u, blocks="official")
    assert relative_error(got, want) <= 1e-12
    got = ether_authors(x, W, u, v, u_out, v_out)
    want = reference.ether_plus_linear(x, W, u, v, u_out=u_out, v_out=v_out, blocks="official")
    assert relative_error(got, want) <= 1e-12


@pytest.mark.parametrize("precision", ["fp32", "bf16-autocast", "bf16-fp32", "bf16"])
@pytest.mark.parametrize("n", [1, 4])
@pytest.mark.parametrize("method", REFLECTIONS)
def test_ours_and_the_authors_form_are_judged_and_timed(method: str, n: int, precision: str, seed: int) -> None:
    """Also where the authors' blocks are others than the paper's, n > 1: each by its own
    formula.
    """
    measured = rows(method, seed, precision, n)
    assert list(measured) == ["frozen", "frozen-again", "dk", "dk-triton", "dk-cuda", "dk-eager", "peft", "authors"]
    for name in ("frozen", "dk", "authors"):
        assert measured[name]["status"] == "ok", measured[name]
        assert measured[name]["median_ms"] > 0
    assert 0 < measured["dk"]["error_to_fp64"] < 0.1
    assert measured["dk"]["n_blocks"] == n
    vectors = {"ether": ["du"], "ether-both": ["du", "du_out"], "ether-plus": ["du", "dv"]}
    wanted = vectors.get(method, ["du", "dv", "du_out", "dv_out"])
    assert list(measured["dk"]["errors"]) == list(measured["authors"]["errors"]) == ["y", "dx", *wanted]
    assert (measured["peft"]["status"], measured["peft"]["note"]) == ("absent", f"PEFT has no {_title(method)}")
    element = 4 if precision == "fp32" else 2
    kept = {name: measured[name]["saved_mib"] * 2**20 for name in ("dk", "authors")}
    assert kept["dk"] == (element * T * N if method.endswith("-both") else 0)
    assert kept["authors"] > kept["dk"]


def _title(method: str) -> str:
    from benchmarks.layer.methods import METHODS

    return METHODS[method].title


@pytest.mark.parametrize("method", ["ether", "ether-plus-both"])
def test_inference_has_a_merged_row(method: str, seed: int) -> None:
    measured = rows(method, seed, n=2, mode=FORWARD)
    assert {row["status"] for row in measured.values()} == {"ok", "absent"}
    assert measured["merged"]["status"] == "ok"
    assert measured["merged"]["saved_mib"] is None


@pytest.mark.parametrize(
    ("op", "at", "seen"), [("reflect", 0, "y"), ("reflect_backward", 0, "dx"), ("reflect_backward", 1, "du")]
)
@pytest.mark.parametrize("method", REFLECTIONS)
def test_a_broken_reflection_is_refused(
    method: str, op: str, at: int, seen: str, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    whole = getattr(eager, op)

    def broken(*args: Any) -> Any:
        result = whole(*args)
        return (
            1.01 * result if isinstance(result, torch.Tensor) else (*result[:at], 1.01 * result[at], *result[at + 1 :])
        )

    monkeypatch.setattr(eager, op, broken)
    measured = rows(method, seed)
    assert measured["dk"]["status"] == "failed"
    assert f"{seen} is off by" in measured["dk"]["note"]
    assert measured["dk"]["median_ms"] is None
    assert measured["authors"]["status"] == "ok"
