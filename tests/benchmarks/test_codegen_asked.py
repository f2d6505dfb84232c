"""What is asked of estimates, and whether they hold."""

from typing import Any

from benchmarks.codegen.asked import asked, cell, holds, summary


def row(layer: str, ratio: float, K: int = 4096, N: int = 4096, **facts: Any) -> dict[str, Any]:
    return {"layer": layer, "K": K, "N": N, "ratio": ratio, "summed_us": 0.0, "kernels": [], **facts}


def test_what_is_asked() -> None:
    rows = [row("lora r=16", 1.18), row("lora r=16", 1.10, N=14336), row("dora r=16", 1.281), row("ether-plus", 9.0)]
    rows += [row("lora r=64", 1.24), row("dora r=64", 1.35), row("goat E=8 r=2", 1.24), row("ether-plus-both", 1.29)]
    rows += [row("lora q, k, v r=16", 1.13, N=12288, summed_us=97.0)]
    assert [asked(each, rows) for each in rows] == [1.18, 1.09, 1.28, None, 1.24, 1.341, 1.23, 1.3, 1.12]
    assert [holds(each, rows) for each in rows] == [True, False, True, None, True, False, False, True, False]
    assert cell(rows[0], rows) == "1.18 holds"
    assert cell(rows[1], rows) == "1.09 fails"
    assert cell(rows[3], rows) == "-"
    assert summary(rows)[0].startswith("asked of 8 layers, holds for 4; not: lora r=16 4096x14336 1.10 for 1.09 fails;")
    assert asked(rows[4], rows[1:]) is None  # the layer that it is held against was not estimated


def test_each_row_norm_over_its_bytes() -> None:
    rows = [row("dora r=16", 1.2, kernels=[{"kernel": "row_norm", "us": 20.0, "bytes_us": 8.0}])]
    rows += [row("dora r=64", 1.2, kernels=[{"kernel": "row_norm", "us": 20.1, "bytes_us": 8.0}])]
    assert [line.rpartition("(")[2] for line in summary(rows)[1:]] == ["2.5 holds)", "2.5 fails)"]
