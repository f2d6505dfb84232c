"""benchmarks.ether: the rival computes what the authors' code does, and every method gets its rows."""

import json
from pathlib import Path

import pytest
import torch

from benchmarks import ether
from benchmarks.ether_authors import ether_authors
from delora_kernels import reference
from delora_kernels.testing import relative_error


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


def test_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "ether.json"
    sizes = ["-T", "16", "-K", "24", "-N", "32", "--rounds", "2", "--threads", "1"]
    monkeypatch.setattr("sys.argv", ["ether", *sizes, "--json", str(file)])
    ether.main()
    rows = json.loads(file.read_text(encoding="utf-8"))["rows"]
    assert [(row["method"], row["impl"]) for row in rows] == [
        (method, impl) for method in ether.METHODS for impl in ("frozen", "dk", "authors")
    ]
    kept = {(row["method"], row["impl"]): row["saved_mib"] * 2**20 for row in rows}
    assert kept["ether", "dk"] == kept["ether-plus", "dk"] == 0
    assert kept["ether-both", "dk"] == kept["ether-plus-both", "dk"] == 4 * 16 * 32
    assert kept["ether", "authors"] > 4 * 24 * 32
    assert len(capsys.readouterr().out.splitlines()) == 3 + len(rows)
